"""AI2D and word error rate: data, scoring, resuming, and what is refused."""

import json
import shutil
import sys
from types import ModuleType

import mlx.core as mx
import pytest

from mlx_optiq_ext import evaluation
from mlx_optiq_ext.errors import InputError, UnsupportedError
from mlx_optiq_ext.evaluation import diagrams, speech


@pytest.fixture
def questions(tmp_path):
    rows = [
        {"question": "What eats grass?", "options": ["cow", "hawk"], "answer": "A"},
        {"question": "Which is a planet?", "options": ["Sun", "Moon", "Mars"], "answer": 2},
        {"question": "What is hot?", "options": ["ice", "fire"], "answer": "1"},
    ]
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.png").write_bytes(b"not read by these tests %d" % number)
        row["image"] = f"{number}.png"
    path = tmp_path / "diagrams.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_questions_are_put_as_lmms_eval_puts_them(questions):
    items = diagrams.read_items(questions)
    assert [item.answer for item in items] == ["A", "C", "B"]
    assert items[1].prompt == (
        "Which is a planet?\nA. Sun\nB. Moon\nC. Mars\n"
        "Answer with the option's letter from the given choices directly."
    )


@pytest.mark.parametrize(
    ("answer", "right"),
    [("A", True), ("a", True), (" A.", True), ("(A)", True), ("B", False), ("A cow", False),
     ("", False), ("The answer is A", False)],
)  # fmt: skip
def test_an_answer_is_matched_without_case_and_punctuation(questions, answer, right):
    assert diagrams.right(answer, diagrams.read_items(questions)[0]) is right


def test_diagrams_end_to_end_with_a_baseline(questions, tiny, packed, monkeypatch):
    said = {"packed": ["A", "C.", "A"], tiny.name: ["B", "A", "b"]}
    asked = []

    def through(model):
        def answer(item):
            asked.append(item.question)
            return said[model.folder.name][int(item.image.stem)]

        return answer

    monkeypatch.setattr(diagrams, "through_mlx_vlm", through)
    models = [evaluation.subject(str(path)) for path in (packed, tiny)]
    settings = evaluation.Settings(data=questions, progress=False)
    report = evaluation.TASKS["ai2d"](models[0], models[1:], settings)
    own, other, pair = report.columns.values()
    assert own["accuracy"] == pytest.approx(200 / 3)
    assert other["accuracy"] == pytest.approx(100 / 3)
    assert (pair["accuracy_only_model"], pair["accuracy_only_baseline"]) == (2, 1)
    assert len(asked) == 6
    evaluation.TASKS["ai2d"](models[0], models[1:], settings)
    assert len(asked) == 6  # a finished run is not asked again


@pytest.fixture
def recordings(tmp_path):
    rows = [
        ("Mr. Smith won't pay twenty dollars.", "mister smith will not pay $20"),
        ("The quick brown fox.", "the quick brown box jumps"),
        ("Hello there", ""),
    ]
    lines = []
    for number, (text, _) in enumerate(rows):
        (tmp_path / f"{number}.wav").write_bytes(b"RIFF%d" % number)
        lines.append(json.dumps({"audio": f"{number}.wav", "text": text}))
    path = tmp_path / "speech.jsonl"
    path.write_text("\n".join(lines))
    return path, [heard for _, heard in rows]


def test_the_rate_is_jiwers_over_the_whole_set(recordings, tiny, monkeypatch):
    import jiwer  # pyright: ignore[reportMissingImports]

    path, heard = recordings
    monkeypatch.setattr(
        speech, "through_mlx_whisper", lambda model: lambda item: heard[int(item.audio.stem)]
    )
    model = evaluation.subject(str(tiny))
    report = evaluation.TASKS["wer"](model, [], evaluation.Settings(data=path, progress=False))
    (column,) = report.columns.values()
    plain = speech.normaliser(tiny)
    said = [plain(item.text) for item in speech.read_items(path)]
    expected = jiwer.wer(said, [plain(text) for text in heard])
    assert column["wer"] == pytest.approx(100 * expected)
    assert 0 < expected < 1
    assert column["recordings"] == 3
    # "won't", "Mr." and "twenty dollars" are what Whisper's normaliser makes of them.
    assert speech.counts(["Mr. Smith won't."], ["mister smith will not"], plain) == [(0, 4)]


def test_an_empty_reference_counts_what_was_heard():
    assert speech.counts(["..."], ["two words"], lambda text: text.strip(".")) == [(2, 0)]
    with pytest.raises(InputError, match="no words"):
        speech.figures([(2, 0)])


def test_spellings_beside_the_model_are_used(tmp_path):
    (tmp_path / "normalizer.json").write_text('{"colour": "color"}')
    assert speech.normaliser(tmp_path)("Colour") == "color"


BAD = {
    "empty": "",
    "no-fields": '{"question": "a"}',
    "no-file": '{"question": "a", "options": ["b"], "answer": 0, "image": "x.png", '
    '"audio": "x.wav", "text": "t"}',
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("module", [diagrams, speech])
def test_a_wrong_file_is_refused_by_line(tmp_path, module, name):
    path = tmp_path / "data.jsonl"
    path.write_text(BAD[name])
    with pytest.raises(InputError, match="is empty" if name == "empty" else "line 1"):
        module.read_items(path)


def test_an_answer_outside_of_the_options_is_refused(tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "a", "options": ["b"], "answer": "C", "image": "x.png"}')
    with pytest.raises(InputError, match="none of 1 options"):
        diagrams.read_items(path)


def test_missing_engines_are_named_with_their_extra(tiny, monkeypatch):
    model = evaluation.subject(str(tiny))
    for name in ("mlx_vlm", "mlx_whisper", "jiwer"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedError, match=r"mlx-optiq-ext\[vlm\]"):
        diagrams.through_mlx_vlm(model)
    with pytest.raises(UnsupportedError, match=r"mlx-optiq-ext\[audio\]"):
        speech.through_mlx_whisper(model)
    with pytest.raises(UnsupportedError, match=r"mlx-optiq-ext\[audio\]"):
        speech.counts(["a"], ["b"], str)
    with pytest.raises(InputError, match="--optiq-data"):
        evaluation.TASKS["wer"](model, [], evaluation.Settings())


@pytest.fixture
def whisper(tmp_path):
    """A folder that looks like a Whisper in mlx-whisper's format."""
    folder = tmp_path / "whisper"
    folder.mkdir()
    (folder / "config.json").write_text('{"n_mels": 80}')
    return evaluation.subject(str(folder))


@pytest.fixture
def engine(monkeypatch):
    """Takes mlx-whisper's place, with the arguments of each call; ffmpeg is there."""
    calls = []

    def transcribe(audio, **options):
        calls.append(options)
        if audio.endswith("bad.wav"):
            raise RuntimeError("Failed to load audio: no such codec\nand more")
        return {"text": "heard"}

    module = ModuleType("mlx_whisper")
    module.transcribe = transcribe  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "mlx_whisper", module)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return calls


def test_speech_on_a_cpu_is_transcribed_in_float32(whisper, engine, tmp_path):
    transcribe = speech.through_mlx_whisper(whisper)
    assert transcribe(speech.Item(tmp_path / "a.wav", "a")) == "heard"
    assert engine[0]["fp16"] is (mx.default_device() != mx.Device(mx.cpu))
    with pytest.raises(
        InputError, match=r"bad\.wav could not be transcribed \(Failed to"
    ) as raised:
        transcribe(speech.Item(tmp_path / "bad.wav", "a"))
    assert "\n" not in str(raised.value)


def test_speech_without_ffmpeg_is_one_sentence(whisper, engine, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UnsupportedError, match="ffmpeg, which is not on the PATH: install it"):
        speech.through_mlx_whisper(whisper)


def test_a_language_model_neither_hears_nor_sees(tiny, engine, monkeypatch):
    model = evaluation.subject(str(tiny))
    with pytest.raises(InputError, match=r"\(qwen3\) is no Whisper"):
        speech.through_mlx_whisper(model)
    vlm, prompts = ModuleType("mlx_vlm"), ModuleType("mlx_vlm.prompt_utils")
    prompts.apply_chat_template = str  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "mlx_vlm", vlm)
    monkeypatch.setitem(sys.modules, "mlx_vlm.prompt_utils", prompts)
    with pytest.raises(InputError, match=r"\(qwen3\) takes none: give a vision-language"):
        diagrams.through_mlx_vlm(model)


def test_a_vision_language_model_that_mlx_vlm_does_not_know_is_one_sentence(tmp_path, monkeypatch):
    def load(folder):
        raise ValueError("Model type new_vl not supported.\nSee the list")

    vlm, prompts = ModuleType("mlx_vlm"), ModuleType("mlx_vlm.prompt_utils")
    vlm.load = load  # pyright: ignore[reportAttributeAccessIssue]
    prompts.apply_chat_template = str  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "mlx_vlm", vlm)
    monkeypatch.setitem(sys.modules, "mlx_vlm.prompt_utils", prompts)
    (tmp_path / "config.json").write_text('{"vision_config": {}}')
    with pytest.raises(InputError, match=r"mlx-vlm cannot load .*new_vl not supported") as raised:
        diagrams.through_mlx_vlm(evaluation.subject(str(tmp_path)))
    assert "\n" not in str(raised.value)


def test_models_whose_weights_have_other_names_are_told_apart(tmp_path):
    keys, sizes = [], []
    for number, name in enumerate(["weights.npz", "weights.npz", "weights.safetensors"]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        if name.endswith("npz"):
            (folder / name).write_bytes(b"%d" % number)
        else:
            mx.save_safetensors(str(folder / name), {"encoder.w.weight": mx.zeros((4, 8))})
        model = evaluation.subject(str(folder))
        keys.append(repr(model.key()))
        sizes.append(model.size())
    assert len(set(keys)) == 3
    assert sizes[0] == {"file_bytes": 1}
    assert sizes[2]["stored_bpw"] == 32
