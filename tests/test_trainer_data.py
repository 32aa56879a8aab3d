"""The trainer's problems: what a file may contain, and that nothing held out is trained on."""

import json
import os
import sys
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")
from gspo_ops.trainer.config import TaskConfig
from gspo_ops.trainer.tasks import Problem, is_correct, make_task, reward_fingerprint


def write(path, entries):
    path.write_text("\n".join(json.dumps(entry) for entry in entries), encoding="utf-8")
    return path


def task_of(path, train=4, held_out=4, **options):
    sizes = {"examples": 0, "train_size": train, "eval_size": held_out}
    return make_task(TaskConfig(name=str(path), **sizes | options), seed=0)


def plain(n=8):
    return [{"prompt": f"say {i}", "answer": i} for i in range(n)]


# Questions consist of these words, so that many are the same or mirrored.
QUESTIONS = st.lists(st.sampled_from(["1", "2", "+", "=", "  "]), min_size=1, max_size=4).map(
    " ".join
)
ENTRIES = st.lists(
    st.tuples(QUESTIONS, st.lists(st.sampled_from("abc"), min_size=1, max_size=2)), max_size=40
)


@settings(max_examples=300, deadline=None)
@given(ENTRIES)
# a question that was left out as the mirror of another returns with another answer
@example([("1", ["a"]), ("1 1", ["a"]), ("1 2 1", ["b"]), ("1 1 2", ["b"]), ("1 1 2", ["a"])])
def test_no_held_out_question_is_trained_on(tmp_path_factory, entries):
    """Neither a held-out question nor one of the same words and answer is in the training set."""
    given_entries = [{"prompt": q, "answer": a} for q, a in entries if q.strip()]
    path = write(tmp_path_factory.mktemp("data") / "problems.jsonl", given_entries)
    if task := task_if_enough(path):
        check_sets(task, given_entries)


def task_if_enough(path):
    try:
        return task_of(path, train=2, held_out=2)
    except ValueError as found:
        error = found
    assert "distinct problems" in str(error)
    return None


def check_sets(task, given_entries):
    problems = [*task.train, *task.held_out]
    assert len(problems) == 4
    for i, problem in enumerate(problems):
        for other in problems[:i]:
            words, others = problem.question.split(), other.question.split()
            assert words != others
            assert sorted(words) != sorted(others) or not {*problem.answers} & {*other.answers}
    for problem in problems:  # all answers of the file are accepted
        words = problem.question.split()
        answers = {a for e in given_entries if e["prompt"].split() == words for a in e["answer"]}
        assert {*problem.answers} == answers
        assert all(is_correct(f" {answer}\n", problem) for answer in answers)


def test_one_prompt_with_two_answers_is_one_problem(tmp_path):
    more = [{"prompt": "say 3", "answer": "three"}, {"prompt": "say 4", "answer": 4.5}]
    entries = [*plain(), *more]
    task = task_of(write(tmp_path / "p.jsonl", entries))
    found = {p.question: p.answers for p in (*task.train, *task.held_out)}
    assert found["say 3"] == ("3", "three")
    assert found["say 4"] == ("4", "4.5")
    assert len(found) == 8


@pytest.mark.parametrize("answer", [None, True, False, float("nan"), {}, [], [None], [["a"]]])
def test_what_is_no_answer_is_refused(tmp_path, answer):
    path = write(tmp_path / "p.jsonl", [*plain(), {"prompt": "x", "answer": answer}])
    with pytest.raises(ValueError, match=r"task\.name: line 9 of .*an answer must be a text, a"):
        task_of(path)


@pytest.mark.parametrize(
    "prompt", [None, 3, "", "  ", [], ["text"], [{"role": "user"}], [{"role": 1, "content": ""}]]
)
def test_what_is_no_prompt_is_refused(tmp_path, prompt):
    path = write(tmp_path / "p.jsonl", [*plain(), {"prompt": prompt, "answer": "a"}])
    with pytest.raises(ValueError, match=r"task\.name: line 9 of .*a prompt must be a non-empty"):
        task_of(path)


@pytest.mark.parametrize("line", ["[1, 2]", "3", '{"prompt": "x"}', "{", '{"answer": "x"}'])
def test_a_line_that_is_no_problem_is_refused(tmp_path, line):
    path = write(tmp_path / "p.jsonl", plain())
    path.write_text(path.read_text() + "\n" + line)
    with pytest.raises(ValueError, match=r"task\.name: line 9 of .* is not"):
        task_of(path)


def test_byte_order_marks_and_odd_line_ends(tmp_path):
    """U+2028 inside a text does not end a line."""
    entries = plain()
    entries[0]["prompt"] = "say\u20280"
    text = "\r\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    path = tmp_path / "p.jsonl"
    path.write_bytes(text.encode("utf-8-sig"))
    assert len({p.question for p in (*task_of(path).train, *task_of(path).held_out)}) == 8
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(ValueError, match=r"task\.name: .* is not UTF-8"):
        task_of(path)


def test_chat_messages(tmp_path):
    chats = [
        [{"role": "system", "content": "Count."}, {"role": "user", "content": f"{i}?"}]
        for i in range(9)
    ]
    path = write(tmp_path / "p.jsonl", [{"prompt": c, "answer": i} for i, c in enumerate(chats)])
    with pytest.raises(ValueError, match=r"task\.chat: must be true for prompts that are chat"):
        task_of(path)
    task = task_of(path, examples=1, chat=True)
    example, problem = task.examples[0], task.train[0]
    assert task.chat(problem) == [
        *example.messages, {"role": "assistant", "content": example.answer}, *problem.messages,
    ]  # fmt: skip
    assert problem.messages == tuple(chats[int(problem.answer)])


def test_a_text_among_chats_is_an_example_with_its_question(tmp_path):
    chats = [[{"role": "user", "content": f"{i}?"}] for i in range(8)]
    entries = [{"prompt": c, "answer": i} for i, c in enumerate(chats)]
    path = write(tmp_path / "p.jsonl", [{"prompt": "a text?", "answer": "yes"}, *entries])
    task = task_of(path, examples=1, chat=True)
    text = Problem("a text?", "yes")
    problem = next(problem for problem in task.train if problem.messages)
    assert replace(task, examples=(text,)).chat(problem) == [
        {"role": "user", "content": "a text?"}, {"role": "assistant", "content": "yes"},
        *problem.messages,
    ]  # fmt: skip


@pytest.mark.parametrize("answer", [" 8", "8\n", "a\nb", ["8", "a\nb"], ""])
def test_an_answer_that_is_never_found_is_refused(tmp_path, answer):
    path = write(tmp_path / "p.jsonl", [*plain(7), {"prompt": "x", "answer": answer}])
    message = r"^task\.reward: 'exact' .* never finds .*, as to 'x': expected 'score' or a"
    with pytest.raises(ValueError, match=message):
        task_of(path)
    assert task_of(path, reward="builtins:len").reward is len  # which may find it


def test_a_fingerprint_is_of_all_that_matters(tmp_path):
    path = tmp_path / "p.jsonl"
    first = task_of(write(path, plain())).fingerprint()
    assert task_of(write(path, plain())).fingerprint() == first
    for place, change in ((0, {"answer": "other"}), (5, {"prompt": "other"})):
        entries = plain()
        entries[place] |= change
        assert task_of(write(path, entries)).fingerprint() != first
    more = [*plain(), {"prompt": "say 1", "answer": "one"}]
    assert task_of(write(path, more)).fingerprint() != first
    assert reward_fingerprint(is_correct) != reward_fingerprint(test_chat_messages)


class Score:
    def __call__(self, response, problem, scale=1):
        return scale * len(response)

    def of(self, response, problem):
        return 0.0


@pytest.mark.parametrize(
    "make", [Score, lambda: Score().of, lambda: partial(Score(), scale=2), lambda: partial(
        is_correct, Score())],
)  # fmt: skip
def test_a_fingerprint_is_not_of_addresses(make):
    one, other = make(), make()
    assert reward_fingerprint(one) == reward_fingerprint(other) != reward_fingerprint(len)


def test_a_fingerprint_is_of_arguments():
    found = {reward_fingerprint(partial(Score(), scale=scale)) for scale in (1, 2, "1")}
    assert len(found) == 3


def test_a_reward_in_the_working_directory(tmp_path, monkeypatch):
    """A console script has its own folder on the path, not the working directory."""
    path = [folder for folder in sys.path if folder not in ("", os.getcwd())]
    monkeypatch.setattr(sys, "path", path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "score_of_here.py").write_text("def score(r, p):\n    return 0.5\n")
    (tmp_path / "broken_of_here.py").write_text("1 / 0")
    task = task_of("sums", reward="score_of_here:score")
    assert task.reward("", task.train[0]) == 0.5
    message = rf"^task\.reward: can't import 'broken.* with {tmp_path} and .*: ZeroDivisionError: "
    with pytest.raises(ValueError, match=message):
        task_of("sums", reward="broken_of_here:score")


# Recurrences


def recurrence(**options):
    return task_of("recurrence", train=20, held_out=20, **options)


def test_recurrences_go_on_with_the_sum_of_the_last_and_the_fourth_last():
    for problem in recurrence(options={"digits": 12}).train:
        digits = [int(digit) for digit in problem.question + problem.answer]
        assert len(problem.question) == 4
        assert len(digits) == 16
        assert all(digits[t] == (digits[t - 1] + digits[t - 4]) % 10 for t in range(4, 16))


@pytest.mark.parametrize(
    ("tokens", "grades"),
    [
        ("437", [1, 1, 1]),
        ("483", [1, 0, 0]),  # after 48, 8 + 4 = 12, whatever was right before
        ("482", [1, 0, 1]),
        (["4", "7x", "3", "\n", "7"], [1, 0, 1, 0, 1]),
        ("", []),
    ],
)
def test_a_digit_is_graded_by_those_before_it(tokens, grades):
    task = recurrence(graded=True)
    assert task.grades(tokens, Problem("3941", "437")) == grades


@pytest.mark.parametrize("options", [{"digits": 0}, {"digits": 2.0}, {"digit": 3}])
def test_bad_options_of_recurrences(options):
    with pytest.raises(ValueError, match=r"task.options: expected only digits, an integer of"):
        recurrence(options=options)


def test_other_tasks_have_no_grades():
    with pytest.raises(ValueError, match=r"task.graded: expected false for 'sums'"):
        task_of("sums", graded=True)
