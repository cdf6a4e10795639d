"""The example learns, stops, resumes and exports, on a small dictionary of made-up words."""

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from pronounce import (  # noqa: E402
    cpp_program,
    data,
    demo,
    evaluate,
    export,
    figure,
    peer,
    report,
    say,
    train,
)
from pronounce.model import Config, Pronouncer  # noqa: E402

TINY = Config(width=32, heads=2, feedforward=64, encoder_layers=2, decoder_layers=2)
SHORT = train.Recipe(epochs=2, batch_size=16)
# A spelling that reads letter by letter, with one digraph: it can be learned in seconds.
CONSONANTS = {"b": "B", "d": "D", "k": "K", "m": "M", "n": "N", "s": "S", "sh": "SH"}
VOWELS = {"a": "AA", "e": "EH", "i": "IH"}
SYLLABLES = {c + v: (CONSONANTS[c], VOWELS[v]) for c in CONSONANTS for v in VOWELS}
TEST_WORDS = ["bad", "shim", "mandike", "sashene", "e", "kebabs"]
UNKNOWN_LETTERS = "cannot pronounce 'näh3': only the letters a-z are known, not 'ä3'"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Problems of this size only lose by more, and pytest-xdist runs several at once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def words() -> data.Dictionary:
    rng = random.Random(0)
    made = {}
    for _ in range(700):
        syllables = rng.choices(list(SYLLABLES), k=rng.randint(1, 3))
        phones = tuple(phone for syllable in syllables for phone in SYLLABLES[syllable])
        made["".join(syllables)] = [phones]
    return dict(sorted(made.items()))


@pytest.fixture(scope="module")
def model() -> Pronouncer:
    torch.manual_seed(0)
    return Pronouncer(TINY).eval()


@pytest.fixture(scope="module")
def script_file(model: Pronouncer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "pronounce.pt"
    export.export_torchscript(model, path)
    return path


def phones_of(pronounced: dict[str, evaluate.Pronounced]) -> dict[str, list[str]]:
    return {word: item.phones for word, item in pronounced.items()}


def parameters(trainer: train.Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


# Data.


def test_dictionary_lines(tmp_path: Path) -> None:
    path = tmp_path / "cmudict.dict"
    path.write_text(
        "tomato T AH0 M EY1 T OW2\ntomato(2) T AH0 M AA1 T OW2 # British\n"
        "tomato(3) T AH1 M AA0 T OW1\n'bout B AW1 T\na.m. EY1 EH1 M\ncat K AE1 T\n"
    )
    assert data.load_dictionary(path) == {
        "tomato": [tuple("T AH M EY T OW".split()), tuple("T AH M AA T OW".split())],
        "cat": [("K", "AE", "T")],
    }


def test_missing_dictionary_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no dictionary file at .*nowhere"):
        data.load_dictionary(tmp_path / "nowhere")


def test_real_dictionary_and_its_splits() -> None:
    try:
        listed = data.load_dictionary()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert len(listed) == 117_493
    assert sum(len(pronunciations) for pronunciations in listed.values()) == 125_571
    sizes = {split: len(data.split_dictionary(listed, split)) for split in ("train", "dev", "test")}
    assert sizes == {"train": 105_818, "dev": 5_839, "test": 5_836}
    used = {phone for all_phones in listed.values() for phones in all_phones for phone in phones}
    assert used == set(data.PHONES)


def test_an_epoch_holds_every_pair_once(words: data.Dictionary) -> None:
    pairs = data.TrainingSet(words)
    batches = list(pairs.epoch(16, torch.Generator().manual_seed(0)))
    assert len(batches) == pairs.steps_per_epoch(16)
    seen = {}
    for batch in batches:
        for letters, length, phones in zip(
            batch.letters.tolist(),
            batch.letter_lengths.tolist(),
            batch.phones.tolist(),
            strict=True,
        ):
            assert phones[0] == data.BEGIN and not any(letters[length:])
            word = "".join(data.LETTERS[i - 1] for i in letters[:length])
            assert word not in seen
            seen[word] = [tuple(evaluate.phone_names(phones[1:]))]
    assert seen == words


def test_an_epoch_can_begin_in_the_middle(words: data.Dictionary) -> None:
    pairs = data.TrainingSet(words)
    whole = list(pairs.epoch(16, torch.Generator().manual_seed(3)))
    rest = list(pairs.epoch(16, torch.Generator().manual_seed(3), first_batch=5))
    assert len(rest) == len(whole) - 5
    assert all(torch.equal(a.phones, b.phones) for a, b in zip(rest, whole[5:], strict=True))


# Model.


def test_decoding_step_by_step_equals_the_parallel_forward(model: Pronouncer) -> None:
    letters, lengths = data.encode_words(TEST_WORDS)
    phones = torch.randint(3, data.NUM_PHONE_IDS, (len(TEST_WORDS), 9))
    with torch.no_grad():
        parallel = model(letters, lengths, phones)
        caches = model.start(letters, lengths)
        for t in range(phones.size(1)):
            logits, weights = model.step(phones[:, t], torch.full_like(lengths, t), caches, lengths)
            torch.testing.assert_close(logits, parallel[:, t], rtol=1e-4, atol=1e-5)
    assert weights.shape == letters.shape
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(TEST_WORDS)))
    assert not weights[letters == data.PAD].any()


def test_padding_does_not_change_a_word(model: Pronouncer) -> None:
    together = evaluate.pronounce_words(model.greedy, TEST_WORDS)
    for word in TEST_WORDS:
        alone = evaluate.pronounce_words(model.greedy, [word])[word]
        assert alone.phones == together[word].phones
        torch.testing.assert_close(alone.alignment, together[word].alignment)


@pytest.mark.parametrize("text", ["näh3", "it's", "3", ""])
def test_unknown_letters(text: str, script_file: Path) -> None:
    problem = "only the letters a-z are known" if text else "a word without letters"
    with pytest.raises(ValueError, match=problem) as python_error:
        data.encode_words(["good", text])
    with pytest.raises(torch.jit.Error) as script_error:
        export.load_torchscript(script_file)(text)
    assert str(python_error.value) in str(script_error.value)


# Training.


def test_training_learns_to_read_words_it_has_not_seen(words: data.Dictionary) -> None:
    known = {word: phones for i, (word, phones) in enumerate(words.items()) if i % 8}
    held_out = {word: phones for word, phones in words.items() if word not in known}
    recipe = train.Recipe(epochs=12, batch_size=16, learning_rate=1e-2)
    config = Config(width=32, heads=2, feedforward=64)
    trainer = train.Trainer(config, recipe, data.TrainingSet(known))
    for epoch in range(recipe.epochs):
        for batch in trainer.batches(epoch, 0):
            trainer.train_step(batch)
    assert trainer.finished
    pronounced = evaluate.pronounce_words(trainer.model.eval().greedy, list(held_out))
    assert evaluate.total_score(phones_of(pronounced), held_out).per < 15.0


def test_ctrl_c_and_resume_give_the_uninterrupted_run(
    words: data.Dictionary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(TINY, dropout=0.1)  # its random numbers must go on, too
    pairs = data.TrainingSet(words)
    dev_words = data.subset(words, 8)
    whole = train.Trainer(config, SHORT, pairs)
    assert train.train(whole, tmp_path / "whole.pt", dev_words)

    first = train.Trainer(config, SHORT, pairs)
    stop_at = pairs.steps_per_epoch(SHORT.batch_size) + 7  # in the middle of the second epoch
    step = train.Trainer.train_step

    def step_with_ctrl_c(self: train.Trainer, batch: data.Batch) -> torch.Tensor:
        loss = step(self, batch)
        if self is first and self.step == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    monkeypatch.setattr(train.Trainer, "train_step", step_with_ctrl_c)
    handler = signal.getsignal(signal.SIGINT)
    assert not train.train(first, tmp_path / "checkpoint.pt", dev_words)
    assert signal.getsignal(signal.SIGINT) is handler
    assert first.step == stop_at and not first.finished
    Pronouncer.load(tmp_path / "checkpoint.pt")  # usable as it is

    second = train.Trainer(config, SHORT, pairs)
    second.resume(tmp_path / "checkpoint.pt")
    assert second.step == stop_at
    assert train.train(second, tmp_path / "checkpoint.pt", dev_words)
    assert torch.equal(parameters(second), parameters(whole))


def test_resume_refuses_another_recipe(words: data.Dictionary, tmp_path: Path) -> None:
    trainer = train.Trainer(TINY, SHORT, data.TrainingSet(words))
    trainer.save(tmp_path / "checkpoint.pt")
    trainer.recipe = dataclasses.replace(SHORT, epochs=3)
    message = "written with the recipe .*'epochs': 2.* has .*'epochs': 3"
    with pytest.raises(ValueError, match=message):
        trainer.resume(tmp_path / "checkpoint.pt")


def test_learning_rate_rises_and_falls() -> None:
    recipe = train.Recipe(learning_rate=1.0, warmup=0.1)
    rates = [recipe.learning_rate_at(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.001


# Scores.


@pytest.mark.parametrize(
    "a, b, distance", [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)]
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert evaluate.edit_distance(a, b) == evaluate.edit_distance(b, a) == distance


def test_scores_take_the_nearest_pronunciation() -> None:
    references = {
        "tomato": [tuple("T AH M EY T OW".split()), tuple("T AH M AA T OW".split())],
        "cat": [("K", "AE", "T")],
        "constantinople": [("K",) * 14],
    }
    hypotheses = {"tomato": "T AH M AA T OW".split(), "cat": ["K", "T"], "constantinople": ["K"]}
    score = evaluate.total_score(hypotheses, references)
    assert (score.words, score.word_errors) == (3, 2)
    assert (score.phones, score.phone_errors) == (23, 14)
    assert score.wer == pytest.approx(200 / 3) and score.per == pytest.approx(1400 / 23)
    by_length = evaluate.scores_by_length(hypotheses, references)
    counts = {name: part.words for name, part in by_length.items() if part.words}
    assert counts == {"1-4": 1, "5-6": 1, "13 or more": 1}
    table = report.length_table(hypotheses, lambda word: ["K", "AE", "T"], references)
    assert "| 1-4 | 1 | 33.33 | 100.0 | 0.00 | 0.0 |" in table and report.PEER_CAVEAT in table
    table = report.length_table(hypotheses, None, references)
    assert table.splitlines()[-1] == "| all | 3 | 60.87 | 66.7 |"


def test_monotone_share() -> None:
    forward, back = torch.eye(4), torch.eye(4)[[0, 2, 1, 3]]
    items = {
        "abcd": evaluate.Pronounced(["B"] * 4, forward),
        "dcba": evaluate.Pronounced(["B"] * 4, back),
    }
    assert evaluate.monotone_share(items) == pytest.approx(100 * 5 / 6)


# Export.


def test_torchscript_pronounces_as_eager(model: Pronouncer, script_file: Path) -> None:
    script = export.load_torchscript(script_file)
    eager = evaluate.pronounce_words(model.greedy, TEST_WORDS)
    for word in TEST_WORDS:
        with torch.no_grad():
            phones, alignment = script(word.upper())
        assert phones == eager[word].phones
        torch.testing.assert_close(alignment, eager[word].alignment)


def test_exported_programs_take_other_sizes(model: Pronouncer) -> None:
    programs = {name: p.module() for name, p in export.export_programs(model).items()}
    exported = export.CompiledPronouncer(programs["start"], programs["step"])
    for some in (TEST_WORDS, ["shim"]):
        expected = evaluate.pronounce_words(model.greedy, some)
        got = evaluate.pronounce_words(exported.greedy, some)
        assert phones_of(got) == phones_of(expected)


@pytest.fixture(scope="module")
def cpp_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    return cpp_program.build(tmp_path_factory.mktemp("cpp") / "build")


@pytest.mark.slow
def test_cpp_program(model: Pronouncer, script_file: Path, cpp_build: Path, tmp_path: Path) -> None:
    program = cpp_build
    eager = phones_of(evaluate.pronounce_words(model.greedy, TEST_WORDS))
    assert cpp_program.run(program, script_file, TEST_WORDS) == eager

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [str(program), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    mixed = run(script_file, "näh3", "bad", "")
    assert mixed.returncode == 1
    assert mixed.stdout.split() == ["bad", *eager["bad"]]
    assert mixed.stderr.splitlines() == [
        f"error: {UNKNOWN_LETTERS}",
        "error: cannot pronounce a word without letters",
    ]
    missing = run(tmp_path / "nowhere.pt", "bad")
    assert missing.returncode == 2
    assert missing.stderr == f"error: no model file at {tmp_path}/nowhere.pt\n"
    (tmp_path / "junk.pt").write_text("junk")
    junk = run(tmp_path / "junk.pt", "bad")
    assert junk.returncode == 2 and "junk.pt is not a TorchScript model" in junk.stderr
    assert run(script_file).returncode == 2


@pytest.mark.slow
def test_demo_from_training_to_the_same_words_by_every_road(
    words: data.Dictionary,
    cpp_build: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dictionary = tmp_path / "cmudict.dict"
    lines = (f"{word} {' '.join(phones)}\n" for word, (phones,) in words.items())
    dictionary.write_text("".join(lines))
    held_out = len(data.split_dictionary(words, "test"))
    recipe = train.Recipe(epochs=1, batch_size=32, learning_rate=1e-2)
    monkeypatch.setitem(train.RECIPES, "default", (TINY, recipe))
    monkeypatch.setattr(cpp_program, "build", lambda: cpp_build)
    monkeypatch.setattr(demo, "load_peer", lambda: lambda word: ["B"])
    output = tmp_path / "run"
    command = ["demo", "--output", str(output), "--dictionary", str(dictionary)]
    monkeypatch.setattr(sys, "argv", command)
    assert demo.main() == 0
    results = (output / "results.md").read_text()
    assert f"| all | {held_out} |" in results and "g2p-en PER" in results
    assert (
        f"Words of {held_out} that differ from the eager model: "
        "TorchScript 0, AOTInductor 0, C++ 0." in results
    )
    assert (output / "alignment.png").stat().st_size > 10_000
    assert "knightsbridge:" in capsys.readouterr().out


def test_without_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk", None)  # as if it were not installed
    assert peer.load_peer() is None


def test_missing_models_are_named(tmp_path: Path) -> None:
    for load in (export.load_torchscript, Pronouncer.load, export.load_aoti):
        with pytest.raises(FileNotFoundError, match=f"no .* at {tmp_path}"):
            load(tmp_path / "nowhere")


# Command lines.


def test_say(
    script_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["say", str(script_file), "bad", "näh3"])
    assert say.main() == 1
    out, err = capsys.readouterr()
    assert out.startswith("bad  ")
    assert err == f"error: {UNKNOWN_LETTERS}\n"
    monkeypatch.setattr(sys, "argv", ["say", str(script_file.parent / "nowhere.pt"), "bad"])
    assert say.main() == 2
    assert "no TorchScript file at" in capsys.readouterr().err


def test_figure_is_drawn_and_refuses_training_words(model: Pronouncer, tmp_path: Path) -> None:
    pronounced = evaluate.pronounce_words(model.greedy, TEST_WORDS[:3])
    figure.draw(pronounced, tmp_path / "alignment.png")
    image = figure.plt.imread(tmp_path / "alignment.png")
    assert image.shape[0] > 200 and image.shape[1] > 400
    assert image.min() < 0.5 < image.max()  # something is drawn
    dictionary = tmp_path / "cmudict.dict"
    dictionary.write_text("tomato T AH0 M EY1 T OW2\n")
    assert data.split_of("tomato") == "train"
    with pytest.raises(ValueError, match="'tomato' is in the training set"):
        figure.unseen(["knightsbridge", "tomato"], dictionary)
    assert figure.unseen(["knightsbridge"], dictionary) == ["knightsbridge"]
