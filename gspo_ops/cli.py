"""`gspo-ops train | plot | sample | compare | bench | verify | env`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from . import __version__
from .environment import environment


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["train"], ["plot"], ["sample"], ["compare"]):
        from . import trainer

        return trainer.COMMANDS[argv[0]](argv[1:])
    if argv[:1] == ["bench"]:
        from .benchmarks import bench

        return bench.main(argv[1:])
    parser = argparse.ArgumentParser(prog="gspo-ops", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("train", help="train a language model with the fused op")
    commands.add_parser("plot", help="draw the metrics of training runs side by side")
    commands.add_parser("sample", help="show what the model of a training run answers")
    commands.add_parser("compare", help="GSPO against GRPO, dense and MoE, several seeds")
    commands.add_parser("bench", help="time the ops against eager PyTorch, torch.compile and peers")
    commands.add_parser("env", help="print versions and devices")
    verify = commands.add_parser("verify", help="check every op against float64 on this machine")
    verify.add_argument(
        "--device",
        type=torch.device,
        default=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        help="where to run (default: %(default)s)",
    )
    verify.add_argument(
        "--model",
        metavar="NAME",
        help="use logits, hidden states and head of a real model: 'smollm2', or a local path that "
        "transformers loads",
    )
    args = parser.parse_args(argv)
    if args.command == "env":
        print(environment())
        return 0
    return _verify(args.device, args.model)


def _verify(device: torch.device, model: str | None) -> int:
    from . import testing

    options: dict[str, Any] = {}
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and device.type == "cpu"
    if interpreted:
        testing.patch_interpreter()
        options["shapes"] = ((9, 3, 1000), (5, 2, 4097))
        options |= {"head_shapes": ((7, 2, 19, 1100),), "quick": True}
    if model is not None:
        options |= _model_outputs(model)
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
    return 1 if over else 0


def _model_outputs(name: str) -> dict[str, Any]:
    """Logits (B, T, V) of a real model on a few texts, the head that gave them, and the (B, T)
    tokens that follow."""
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
