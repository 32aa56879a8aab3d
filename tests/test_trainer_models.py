"""Model families in the trainer: log-probs equal the model's own, or the model is refused.

Windows have 8 tokens, fewer than the prompts.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")
pytest.importorskip("matplotlib")
from gspo_ops.trainer.config import load_config  # noqa: E402
from gspo_ops.trainer.learner import Learner  # noqa: E402
from gspo_ops.trainer.model import load_model  # noqa: E402
from gspo_ops.trainer.ranks import Ranks  # noqa: E402
from gspo_ops.trainer.rollout import Rollout, check_sampling, own_log_probs  # noqa: E402
from gspo_ops.trainer.tiny import character_tokenizer  # noqa: E402

# Classes without the last part of their names, by layout: one row for a prompt and its responses,
# or one row for each response.
SHARED = (
    "Apertus", "BertLMHeadModel", "Cohere", "DeepseekV3", "Emu3", "Ernie4_5_Moe",
    "GPT2LMHeadModel", "GPTNeoX", "Gemma", "Glm4", "Granite", "Helium", "HyperCLOVAX", "Llama",
    "Llama4", "MiniCPM3", "Nemotron", "OPT", "Olmo2", "Olmoe", "Phi", "Qwen2", "Qwen3",
    "Qwen3Moe", "SmolLM3", "StableLm",
)  # fmt: skip
SEPARATE = (
    "BigBird", "Bloom", "Cohere2", "Exaone4", "Falcon", "GPTJ", "GPTNeo", "Gemma2", "Gemma3",
    "GptOss", "Mistral", "Mixtral", "ModernBertDecoder", "Mpt", "Olmo3", "Phi3", "Starcoder2",
)  # fmt: skip
REFUSED = (
    "Bart", "CpmAnt", "FalconMamba", "Jamba", "Mamba", "OpenAIGPTLMHeadModel", "Qwen3Next",
    "RecurrentGemma", "Roberta", "Rwkv", "Whisper", "XLNetLMHeadModel", "xLSTM",
)  # fmt: skip


@pytest.fixture(scope="module")
def make():
    """Provide `make(name)`, which returns a small random model as in test_models.py."""
    spec = importlib.util.spec_from_file_location(
        "models", Path(__file__).parent / "test_models.py"
    )
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)

    def made(name):
        is_whole = hasattr(transformers, name)
        model = models.make(name if is_whole else f"{name}ForCausalLM")
        if model._supports_sdpa:
            model.set_attn_implementation("sdpa")
        models.widen(model, models.make_batch(model))
        return model

    return made


def make_rollout(width=12, length=6):
    """Return two prompts, one of them padded, with three responses each."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, 80, (2, width), generator=generator)
    prompt_mask = torch.ones(2, width, dtype=torch.bool)
    prompt_mask[1, : width // 4] = False
    responses = torch.randint(2, 80, (6, length), generator=generator)
    lengths = torch.tensor([6, 3, 5, 1, 6, 4]) * length // 6
    real = torch.arange(length) < lengths[:, None]
    turn = torch.where(real, 0, -1)
    return Rollout(prompts, prompt_mask, responses, real, turn, torch.zeros(6, length))


def make_learner(model):
    config = load_config(None, ["dtype=float32", "device=cpu"])
    return Learner(config, model, Ranks(torch.device("cpu")))


@pytest.mark.parametrize(
    ("name", "layout"),
    [*((name, "shared") for name in SHARED), *((name, "separate") for name in SEPARATE)],
)
def test_log_probs_are_the_model_s_own(make, name, layout):
    model, rollout = make(name), make_rollout()
    check_sampling(model)
    learner = make_learner(model)
    learner._choose_layout(rollout)
    assert learner.layout == layout
    own = own_log_probs(model, rollout, 1.0)
    torch.testing.assert_close(learner.log_probs(rollout), own, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["BioGpt", "Falcon", "OPT"])
def test_checkpointing_switches_no_dropout_on(make, name):
    model, rollout = make(name), make_rollout()
    dropouts = {k: 0.5 for k, v in model.config.to_dict().items() if "drop" in k and v is not None}
    assert dropouts
    model.config.update(dropouts)
    model = type(model)(model.config).eval()
    overrides = ["dtype=float32", "device=cpu", "update.gradient_checkpointing=true"]
    learner = Learner(load_config(None, overrides), model, Ranks(torch.device("cpu")))
    before = learner.log_probs(rollout)
    with learner._checkpointing():
        assert any(module.training for module in model.modules())
        assert torch.equal(learner.log_probs(rollout), before)
    assert not any(module.training for module in model.modules())
    assert {name: getattr(model.config, name) for name in dropouts} == dropouts


@pytest.mark.parametrize("name", ["Gemma2", "Llama", "Mpt"])
def test_models_without_sdpa_can_be_loaded(make, name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    loaded, _ = load_model(str(tmp_path))
    assert loaded.config._attn_implementation == ("sdpa" if model._supports_sdpa else "eager")


@pytest.mark.parametrize("name", REFUSED)
def test_refused(make, name):
    with pytest.raises(ValueError, match=rf"model\.name: .*{name}"):
        check_sampling(make(name))


@pytest.mark.parametrize(("length", "layout"), [(31, "shared"), (32, "separate")])
def test_responses_much_longer_than_prompts_have_their_own_rows(make, length, layout):
    model, rollout = make("Llama"), make_rollout(4, length)
    learner = make_learner(model)
    learner._choose_layout(rollout)
    assert learner.layout == layout
    own = own_log_probs(model, rollout, 1.0)
    torch.testing.assert_close(learner.log_probs(rollout), own, atol=1e-5, rtol=0)


def test_a_window_is_noticed_when_rows_grow_longer_than_it(make):
    """The layout changes when rows outgrow the window of 8 tokens."""
    learner = make_learner(make("Mistral"))
    long = make_rollout()
    short = long._replace(
        prompts=long.prompts[:, -3:], prompt_mask=long.prompt_mask[:, -3:],
        **{name: getattr(long, name)[:, :4] for name in ("responses", "real", "turn", "log_probs")},
    )  # fmt: skip
    learner._choose_layout(short)
    assert learner.layout == "shared"
    state = learner.state_dict()
    learner._choose_layout(long)
    assert learner.layout == "separate"
    learner.load_state_dict(state)
    assert (learner.layout, learner.compared) == ("shared", 7)


def test_the_table_is_that_of_the_docs():
    text = (Path(__file__).parent.parent / "docs/trainer.md").read_text()
    for row, names in (("one row for a prompt and its responses", SHARED),
                       ("one row for each response", SEPARATE), ("refused", REFUSED)):  # fmt: skip
        listed = ", ".join(name.removesuffix("LMHeadModel") for name in names)
        assert f"| {row} | {listed} |" in text
