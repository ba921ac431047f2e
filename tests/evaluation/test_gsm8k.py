"""GSM8K by lm-eval's task and filters, and item by item against lm-eval's own parts."""

import json
import random

import pytest
from live_server import write_exact

from mlx_optiq_ext import evaluation
from mlx_optiq_ext.errors import InputError, UnsupportedError
from mlx_optiq_ext.evaluation import harness, word_problems
from mlx_optiq_ext.evaluation.journal import Journal

pytestmark = pytest.mark.newest


def write(path, count):
    lines = [
        {
            "question": f"Mia has {n} bags of {k} plums. How many plums?",
            "answer": f"x\n#### {n * k}",
        }
        for n, k in ((number + 2, number % 7 + 2) for number in range(count))
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return lines


def recorded(lines):
    """An answer an item, right and wrong, in the forms that models give."""
    draw = random.Random(0)
    forms = (
        "So it is {n}. The answer is {n}.", "The answer is ${n}.00.", "#### {n}",
        "{n} plums", "We have 3 + 4 = 7. The answer is {n} plums", "It is 12, no, {n}!", "none",
        "The answer is -{n}.", "The answer is {n},000.", "**{n}**\nQ: What is 5?\nA: 5", "$",
        "the answer is: {n}", "The answer is {n}.5.", "A: {n}. Then 2 more. The answer is 2.",
    )  # fmt: skip
    wrong = (0, 0, 0, 1, 10)
    return [
        draw.choice(forms).format(n=int(line["answer"].split("#### ")[1]) + draw.choice(wrong))
        for line in lines
    ]


@pytest.mark.parametrize("shots", [8, 5])
def test_two_hundred_answers_are_scored_as_lm_eval_scores_them(tiny, tmp_path, shots):
    from lm_eval.api.metrics import exact_match_fn  # pyright: ignore[reportMissingImports]
    from lm_eval.filters.extraction import RegexFilter  # pyright: ignore[reportMissingImports]

    lines = write(tmp_path / "test.jsonl", 200)
    write(tmp_path / "train.jsonl", 20)
    said = recorded(lines)
    by_question = {line["question"]: text for line, text in zip(lines, said, strict=True)}
    prompts = []

    def answer(model, tokenizer, texts, max_tokens, *, special):
        prompts.extend(texts)
        return [
            by_question[max(by_question, key=lambda question, t=text: t.rfind(question))]
            for text in texts
        ]

    config = word_problems.config_for(tmp_path / "test.jsonl", shots)
    found = word_problems.answers(
        evaluation.subject(str(tiny)),
        config,
        evaluation.Settings(shots=0, chat_template=False, progress=False),
        answer,
    )
    assert len(prompts) == 200
    (metric,) = config["metric_list"]
    options = {key: metric[key] for key in ("ignore_case", "ignore_punctuation")}
    task = {each["name"]: each["filter"][0] for each in config["filter_list"]}
    for name, ours in word_problems.FILTERS.items():
        settings = {k: v for k, v in task[name].items() if k != "function"}
        stops = config["generation_kwargs"]["until"]
        cut = [[harness._cut(text, stops, None)] for text in said]
        extracted = RegexFilter(**settings).apply(cut, [{}] * 200)
        expected = [
            bool(
                exact_match_fn(
                    predictions=[answer[0]],
                    references=[
                        line["answer"] if shots == 5 else line["answer"].split("####")[-1].strip()
                    ],
                    regexes_to_ignore=metric["regexes_to_ignore"],
                    **options,
                )["exact_match"]
            )
            for answer, line in zip(extracted, lines, strict=True)
        ]
        assert found[ours] == expected
        assert 5 < sum(expected) < 195


def test_a_toy_answers_end_to_end_and_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch):
    write(tmp_path / "test.jsonl", 4)
    # Half precision is slow on a CPU, and eight examples are a long prompt.
    model = evaluation.subject(str(write_exact(tiny, tmp_path / "exact")))
    settings = evaluation.Settings(
        data=tmp_path / "test.jsonl", limit=2, max_tokens=4, batch_size=1, progress=False
    )
    real, calls = Journal.put_item, []

    def interrupted(journal, text, answer):
        assert text.count("Q:") == 9  # eight examples and the question
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(journal, text, answer)

    monkeypatch.setattr(Journal, "put_item", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluation.TASKS["gsm8k"](model, [model], settings)
    report = evaluation.TASKS["gsm8k"](model, [model], settings)
    # One was kept; the baseline is the same model, whose answers are known.
    assert calls == [1, 1, 1]
    columns = list(report.columns.values())
    assert columns[0]["items"] == 2
    assert columns[-1]["strict_mcnemar_p"] == 1


WRONG = {
    "empty": ("", "is empty"),
    "not-json": ("{", "line 1"),
    "no-answer": ('{"question": "a"}', "no question and answer"),
    "no-number": ('{"question": "a", "answer": "b"}', "####"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused(tmp_path, name):
    content, message = WRONG[name]
    path = tmp_path / "test.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        word_problems.config_for(path, 8)


def test_wrong_examples_and_a_missing_package_are_refused(tmp_path, monkeypatch):
    write(tmp_path / "test.jsonl", 2)
    with pytest.raises(InputError, match=r"train\.jsonl beside"):
        word_problems.config_for(tmp_path / "test.jsonl", 5)
    with pytest.raises(InputError, match="not 3"):
        word_problems.config_for(tmp_path / "test.jsonl", 3)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"mlx-optiq-ext\[eval\]"):
        harness.require()


@pytest.mark.shared
def test_the_real_test_set_is_read(shared):
    assert len(word_problems.read_items(shared / "data" / "gsm8k" / "test.jsonl")) == 1319
