"""`gspo-ops train | plot | sample | compare | bench | verify | env`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from . import __version__
from .backend import device_exists
from .environment import ISSUES, environment

_EXAMPLES = """examples:
  gspo-ops verify                    check the ops on this machine
  gspo-ops bench                     compare them with what you run now
  gspo-ops train --preset demo       train SmolLM2-135M-Instruct, minutes on two CPU cores
  gspo-ops verify --help             options and examples of a command
"""
_VERIFY_EXAMPLES = """examples:
  gspo-ops verify                    on the GPU if there is one, else on the CPU
  gspo-ops verify --device cpu
  gspo-ops verify --model smollm2    on the logits and hidden states of a real model
  TRITON_INTERPRET=1 gspo-ops verify --device cpu    fewer checks, of the kernels without a GPU
"""
_ENV_EXAMPLE = "example: gspo-ops env > environment.txt, for a bug report"
_AFTER_VERIFY = "gspo-ops bench compares time and memory with what you run now"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["train"], ["plot"], ["sample"], ["compare"]):
        from . import trainer

        return trainer.COMMANDS[argv[0]](argv[1:])
    if argv[:1] == ["bench"]:
        from .benchmarks import bench

        return bench.main(argv[1:])
    args = _parser().parse_args(argv)
    if args.command == "env":
        print(environment())
        return 0
    return _verify(args.device, args.model)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gspo-ops",
        description="Fused policy-gradient losses: train with them, check them and time them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("train", help="train a language model with the fused loss")
    commands.add_parser("plot", help="draw the metrics of training runs side by side")
    commands.add_parser("sample", help="show what the model of a training run answers")
    commands.add_parser("compare", help="train GSPO against GRPO: MoE, or with --map dense too")
    commands.add_parser("bench", help="time the ops against eager PyTorch, torch.compile and peers")
    commands.add_parser("env", help="print versions and devices", epilog=_ENV_EXAMPLE)
    verify = commands.add_parser(
        "verify",
        help="check every op against float64 on this machine",
        description="Check every op, dtype, layout and objective against float64 on this machine.",
        epilog=_VERIFY_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify.add_argument(
        "--device",
        type=_device,
        default=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        help="where to run (default: %(default)s)",
    )
    verify.add_argument(
        "--model",
        metavar="NAME",
        help="use logits, hidden states and head of a real model: 'smollm2', or a local path that "
        "transformers loads",
    )
    return parser


def _device(name: str) -> torch.device:
    if not device_exists(name):
        raise argparse.ArgumentTypeError(
            f"expected 'cpu' or a GPU of this machine, such as 'cuda:0', got {name!r}"
        )
    return torch.device(name)


def _verify(device: torch.device, model: str | None) -> int:
    from . import testing

    options: dict[str, Any] = {}
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and device.type == "cpu"
    if interpreted:
        testing.patch_interpreter()
        options["shapes"] = ((9, 3, 1000), (5, 2, 4097))
        options |= {"head_shapes": ((7, 2, 19, 1100),), "quick": True}
    if model is not None:
        try:
            options |= _model_outputs(model)
        except (ValueError, ImportError) as error:
            why = str(error).removeprefix("model.name: ")
            print(f"gspo-ops verify: error: --model: {why}", file=sys.stderr)
            return 2
    path = "Triton's interpreter" if interpreted else "Triton" if device.type == "cuda" else "torch"
    print(f"{environment()}\nverifying on {device} ({path}) against float64")

    def progress(line: str) -> None:
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    show = progress if sys.stderr.isatty() else lambda line: None
    measured = testing.verify(device, progress=show, **options)
    show("")
    print(testing.table(measured))
    over = [m for m in measured if not m.ok]
    print(f"{len(measured)} checks, {len(over)} over their bound")
    print(f"next: report all of this at {ISSUES}" if over else f"next: {_AFTER_VERIFY}")
    return 1 if over else 0


def _model_outputs(name: str) -> dict[str, Any]:
    """Return a model's logits (B, T, V) on a few texts, its head, and the (B, T) next tokens."""
    from .testing import HeadTensors
    from .trainer.model import load_model

    model, tokenizer = load_model(name)
    rows = [tokenizer(text)["input_ids"] for text in _TEXTS]
    T = min(len(row) for row in rows)
    ids = torch.tensor([row[:T] for row in rows])
    last = model.get_output_embeddings()
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    hidden = output.hidden_states[-1][:, :-1].float()
    head = HeadTensors(hidden, last.weight.detach().float(), getattr(last, "bias", None))
    return {"logits": output.logits[:, :-1], "head": head, "targets": ids[:, 1:]}


_TEXTS = (
    "The sum of seven and five is twelve, and the sum of twelve and nine is twenty-one. To check",
    "In the beginning the river ran straight to the sea, and nobody on its banks could remember it",
    "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n\n\nprint(add(1, 2))",
    "Water boils at 100 degrees Celsius at sea level, but at 90 degrees on a high mountain because",
    "Dear Sir or Madam, I am writing to ask whether the room that I booked for the third of May is",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987, 1597, 2584, 4181, 6765, 10946",
)


if __name__ == "__main__":
    sys.exit(main())
