import contextlib
import itertools
import multiprocessing
import os
import pickle
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch

with contextlib.suppress(ImportError):
    # Inductor imports setuptools, which fails once something has imported Python's own distutils.
    import setuptools  # noqa: F401

import doc_code

from gspo_ops import testing

ROOT = Path(__file__).parent.parent
# These test the repository: an unpacked sdist has neither its links nor its benchmark results.
OF_A_CHECKOUT = ("test_packaging.py", "test_readme.py")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    testing.patch_interpreter()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "example(page, heading): executes code of README.md, docs/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Drop tests that belong to other processes; skip those of a checkout in an unpacked sdist.

    Several processes can split the tests without a plugin: each one runs its part.
    """
    if part := os.environ.get("GSPO_OPS_TESTS_PART"):
        first, step = map(int, part.split("/"))
        items[:] = items[first::step]
    if (ROOT / "PKG-INFO").is_file():
        skip = pytest.mark.skip(reason="tests a checkout, and this is an unpacked sdist")
        for item in items:
            if item.path.name in OF_A_CHECKOUT:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def same_numbers_in_every_run() -> None:
    """Seed torch, so that a test's random numbers do not depend on the order of tests."""
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """Return the GPU if there is one, so that the same tests run the compiled kernels."""
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


# Code of documents


@pytest.fixture(scope="session")
def python_blocks() -> Callable[[str], dict[str, list[str]]]:
    """Provide `python_blocks(page)`, which maps each heading to the Python code under it."""

    def of_page(page: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for block in doc_code.blocks(page):
            found.setdefault(block.heading, []).append(block.code)
        return found

    return of_page


# Programs


class Forked:
    """Python code that runs in its own process, without the seconds that imports take."""

    CONTEXT = multiprocessing.get_context("forkserver")

    def __init__(self, code: str, errors: Path) -> None:
        self.errors = errors
        errors.touch()
        streams = f"""
import os
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
os.dup2(os.open({str(errors)!r}, os.O_WRONLY), 2)
"""
        self.process = self.CONTEXT.Process(target=exec, args=(streams + code, {}))
        self.process.start()

    def status(self) -> int | None:
        """Return the exit status: None while it runs, negative after a signal."""
        return self.process.exitcode

    def kill(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self) -> tuple[int | None, str]:
        """Wait for the end; return the exit status and what was written to stderr."""
        self.process.join(timeout=300)
        return self.status(), self.errors.read_text()


@pytest.fixture(scope="session")
def forked(tmp_path_factory) -> Callable[[str], Forked]:
    """Provide `forked(code)`, which runs code in a process that has the trainer's imports."""
    Forked.CONTEXT.set_forkserver_preload(
        ["gspo_ops.trainer.loop", "transformers.models.llama.modeling_llama", "matplotlib.pyplot"]
    )
    folder = tmp_path_factory.mktemp("errors")
    numbers = itertools.count()
    return lambda code: Forked(code, folder / str(next(numbers)))


# Models


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    """Save a model with random weights as transformers does, and return its directory."""
    transformers = pytest.importorskip("transformers")
    from gspo_ops.trainer.tiny import character_tokenizer

    path = tmp_path_factory.mktemp("model")
    tokenizer = character_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, pad_token_id=0,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


# Several ranks


class Ranks:
    """Processes of one gloo group, which all call the same functions of test modules."""

    PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); import conftest; conftest.serve()"

    def __init__(self, size: int, folder: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size)}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", self.PROGRAM, str(Path(__file__).parent)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env=environment | {"RANK": str(rank), "STORE": str(folder / f"store{size}")},
            )
            for rank in range(size)
        ]  # fmt: skip

    def __call__(self, function: Callable, *arguments: object) -> list:
        """Return what function(*arguments) returns on each rank, which loads its module by path."""
        path = function.__globals__["__file__"]
        for process in self.processes:
            pickle.dump((path, function.__name__, arguments), process.stdin)
            process.stdin.flush()
        answers = [pickle.load(process.stdout) for process in self.processes]
        failed = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(answers) if error]
        assert not failed, "\n".join(failed)
        return [value for value, _ in answers]

    def close(self) -> None:
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            process.wait()


def serve() -> None:
    """Serve as a rank: call each requested function and answer with its value or traceback."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed must not get between the answers
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{os.environ['STORE']}",
        rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    modules: dict[str, dict] = {}
    while requests.peek(1):
        path, name, arguments = pickle.load(requests)
        if path not in modules:
            modules[path] = runpy.run_path(path)
        try:
            answer = modules[path][name](*arguments), None
        except Exception:
            answer = None, traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def ranks(tmp_path_factory) -> Iterator[Callable[[int], Ranks]]:
    """Provide `ranks(G)`: G processes that live as long as the session."""
    groups: dict[int, Ranks] = {}

    def of_size(size: int) -> Ranks:
        if size not in groups:
            groups[size] = Ranks(size, tmp_path_factory.mktemp("ranks"))
        return groups[size]

    yield of_size
    for group in groups.values():
        group.close()
