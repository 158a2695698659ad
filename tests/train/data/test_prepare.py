"""The whole way from files to samples: counts, limits, order, the cache, processes, a stream."""

from __future__ import annotations

import gc
import json
import pickle
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from fusewright.errors import DataError, RecipeError
from fusewright.train.data import PreparedData, Sample, Samples, prepare, workers
from fusewright.train.data.formats import registry
from fusewright.train.data.prepare import StreamedPacks
from fusewright.train.data.readers.sources import DataSource
from fusewright.train.data.workers import Work
from fusewright.train.recipe.recipe import Recipe
from fusewright.train.report.format import rows_message
from fusewright.train.trainer.batches import training_sequences

from ..conftest import chat, make_tokenizer, write_rows

Make = Callable[..., PreparedData]


def write(path: Path, count: int, word: str = "row") -> Path:
    lines = [chat(f"{word} {i}?", f"{word} {i}, " * (1 + i % 3)) for i in range(count)]
    return write_rows(path, lines)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Prepares the rows of a recipe with the given keys; by default, 40 of them."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", 40)

    def prepared(**keys: Any) -> PreparedData:
        keys = {"datasets": [{"path": str(tmp_path / "rows.jsonl")}], "sequence_len": 128, **keys}
        return prepare(Recipe(base_model="x", **keys), make_tokenizer())

    return prepared


def questions(samples: Any) -> list[str]:
    """What the user asks in each sample."""
    tokenizer = make_tokenizer()
    return [tokenizer.decode(s.input_ids).split("\n")[1].split("?")[0] for s in samples]


def test_samples_and_counts(make: Make) -> None:
    prepared = make(val_set_size=8)
    assert isinstance(prepared.train, Samples)
    (held,) = prepared.validation.values()
    assert len(prepared.train) == 32
    assert sorted(questions(prepared.train) + questions(held)) == sorted(
        f"row {i}" for i in range(40)
    )
    assert prepared.train.lengths.tolist() == [len(s.input_ids) for s in prepared.train]
    assert prepared.train.trained.tolist() == [s.trained for s in prepared.train]
    assert prepared.train.lengths.dtype == np.int32
    counts = prepared.counts
    assert counts["rows"] == 40
    assert counts["train_tokens"] == sum(len(s.input_ids) for s in prepared.train)
    assert counts["validation_trained_tokens"] == sum(s.trained for s in held)
    assert list(prepared.train[3:5]) == [prepared.train[3], prepared.train[4]]
    assert list(pickle.loads(pickle.dumps(prepared.train))) == list(prepared.train)


def test_long_short_and_empty_rows(make: Make, tmp_path: Path) -> None:
    rows = [chat("q", "a" * n) for n in (1, 50, 60, 90)] + [chat("q" * 90, "a")]
    path = write_rows(tmp_path / "lengths.jsonl", rows)
    keys = {"datasets": [{"path": str(path)}], "sequence_len": 90}
    dropped = make(**keys)
    assert dropped.counts["too_long"] == 2
    assert len(dropped.train) == 3  # type: ignore[arg-type]
    cut = make(**keys, excess_length_strategy="truncate")
    # of the row with the long question nothing but the question is left
    assert [cut.counts[k] for k in ("too_long", "truncated", "nothing_to_train")] == [2, 1, 1]
    assert max(cut.train.lengths) == 90  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"lengths\.jsonl, line 4: 112 tokens, and sequence_len"):
        make(**keys, excess_length_strategy="raise")
    assert make(**keys, min_sample_len=40).counts["too_short"] == 1
    with pytest.raises(DataError, match=r"of 5, 5 are longer than 8 tokens \(sequence_len\)"):
        make(**{**keys, "sequence_len": 8})


def test_the_order_is_the_recipes(make: Make, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", 10, "other")
    two = [{"path": str(tmp_path / "rows.jsonl"), "split": "train[:10]"}, {"path": str(other)}]
    ordered = [f"row {i}" for i in range(10)] + [f"other {i}" for i in range(10)]
    assert questions(make(datasets=two, shuffle_merged_datasets=False).train) == ordered
    mixed = questions(make(datasets=two).train)
    assert mixed != ordered
    assert sorted(mixed) == sorted(ordered)
    assert mixed == questions(make(datasets=two).train)
    assert mixed != questions(make(datasets=two, seed=1).train)
    apart = questions(
        make(
            datasets=two, shuffle_merged_datasets=False, shuffle_before_merging_datasets=True
        ).train
    )
    assert {q.split()[0] for q in apart[:10]} == {"row"}
    assert apart != ordered


def test_weights_repeat_and_leave_out_but_never_mix_the_sides(make: Make, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", 10, "other")
    two = [
        {"path": str(tmp_path / "rows.jsonl"), "weight": 0.5},
        {"path": str(other), "weight": 2.5},
    ]
    prepared = make(datasets=two, val_set_size=10)
    asked, held = questions(prepared.train), questions(prepared.validation["validation"])
    assert not set(asked) & set(held)
    rows = 40 - sum(q.startswith("row") for q in held)
    others = 10 - sum(q.startswith("other") for q in held)
    assert sum(q.startswith("row") for q in asked) == round(rows / 2)
    assert sum(q.startswith("other") for q in asked) == 2 * others + round(others / 2)


def test_parts_duplicates_and_other_validation_rows(make: Make, tmp_path: Path) -> None:
    shard = make(dataset_shard_num=4, dataset_shard_idx=1)
    assert len(shard.train) == 10  # type: ignore[arg-type]
    path = tmp_path / "rows.jsonl"
    twice = [{"path": str(path)}, {"path": str(path)}]
    unique = make(datasets=twice, dataset_exact_deduplication=True)
    assert (len(unique.train), unique.counts["duplicates"]) == (40, 40)  # type: ignore[arg-type]
    held = make(test_datasets=[{"path": str(write(tmp_path / "t.jsonl", 5, "test"))}])
    assert questions(held.validation["test_1"]) == [f"test {i}" for i in range(5)]
    assert len(held.train) == 40  # type: ignore[arg-type]
    shorter = make(val_set_size=20, eval_sequence_len=40)
    assert max(shorter.validation["validation"].lengths) <= 40
    assert shorter.counts["validation_too_long"] > 0


# --- the cache -----------------------------------------------------------------------------------


def test_the_cache_is_used_until_something_changes(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worked: list[int] = []
    part = Work.part

    def counting(self: Work, rows: list[Any]) -> Any:
        worked.append(len(rows))
        return part(self, rows)

    monkeypatch.setattr(Work, "part", counting)
    keys = {"dataset_prepared_path": str(tmp_path / "prepared")}
    first = make(**keys)
    assert len(worked) == 1
    second = make(**keys, val_set_size=4, seed=3)  # cut and shuffled afterwards
    assert len(worked) == 1
    assert first.fingerprint == second.fingerprint
    changes: list[dict[str, Any]] = [
        {"sequence_len": 127}, {"train_on_inputs": True}, {"min_sample_len": 5},
        {"datasets": [{"path": str(tmp_path / "rows.jsonl"), "train_on_eos": "last"}]},
        {"chat_template": "llama3"},
    ]  # fmt: skip
    for number, change in enumerate(changes, start=2):
        if "chat_template" in change:
            change |= {"eot_tokens": [], "datasets": [
                {"path": str(tmp_path / "rows.jsonl"), "train_on_eos": "none"}]}  # fmt: skip
        assert make(**keys, **change).fingerprint != first.fingerprint
        assert len(worked) == number
    (tmp_path / "rows.jsonl").rename(tmp_path / "moved.jsonl")
    moved = make(**keys, datasets=[{"path": str(tmp_path / "moved.jsonl")}])
    assert moved.fingerprint == first.fingerprint  # the content counts, not its place
    with (tmp_path / "moved.jsonl").open("a") as file:
        file.write(json.dumps(chat("one", "more")) + "\n")
    more = make(**keys, datasets=[{"path": str(tmp_path / "moved.jsonl")}])
    assert len(more.train) == 41  # type: ignore[arg-type]
    assert not list((tmp_path / "prepared").glob(".making-*"))


@pytest.mark.parametrize("damage", ["cut", "flip", "about", "gone"])
def test_a_damaged_cache_is_made_anew(make: Make, tmp_path: Path, damage: str) -> None:
    keys = {"dataset_prepared_path": str(tmp_path / "prepared")}
    first = make(**keys)
    expected = list(first.train)  # type: ignore[arg-type]
    folder = tmp_path / "prepared" / first.fingerprint
    data, about = folder / "train.arrow", folder / "about.json"
    if damage == "cut":
        data.write_bytes(data.read_bytes()[:-100])
    elif damage == "flip":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(bytes(content))
    elif damage == "about":
        about.write_text("{")
    else:
        data.unlink()
    assert list(make(**keys).train) == expected  # type: ignore[arg-type]
    assert list((tmp_path / "prepared").iterdir()) == [folder]


def test_without_a_folder_nothing_is_left(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(tmp_path.iterdir())
    prepared = make()
    assert isinstance(prepared.train, Samples)
    path = prepared.train.path
    some = prepared.train[:3]
    del prepared
    gc.collect()
    assert path.exists()  # some are still used
    assert len(some[2].input_ids) > 3
    del some
    gc.collect()
    assert not path.parent.parent.exists()
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(DataError):
        make(datasets=[{"path": str(tmp_path / "broken.jsonl")}])
    assert set(tmp_path.iterdir()) - before == {tmp_path / "broken.jsonl"}


@pytest.mark.long
def test_processes_change_nothing_but_the_time(make: Make, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", 1500)
    one, two = make(), make(dataset_processes=2)
    assert list(one.train) == list(two.train)  # type: ignore[arg-type]
    assert one.counts == two.counts
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    lines[1200] = lines[7] = '{"messages": []}'
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    said = r"rows\.jsonl, line 8: the field 'messages' must be .*\(likewise line 1201\); 2 rows"
    with pytest.raises(DataError, match=said):
        make(dataset_processes=2)


def test_one_run_names_the_bad_rows(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "rows.jsonl", 1500)
    lines = file.read_text().splitlines()
    for number in (8, 700, 1201):
        lines[number - 1] = '{"messages": []}'
    file.write_text("\n".join(lines))
    said = "the field 'messages' must be"
    with pytest.raises(DataError) as refused:
        make()
    assert str(refused.value).startswith(f"{file}, line 8: {said}")
    assert str(refused.value).endswith("(likewise line 700, line 1201); 3 rows cannot be used")
    lines[6] = "{"
    lines[8:100] = ["[1"] * 92
    file.write_text("\n".join(lines))
    with pytest.raises(DataError) as refused:
        make()
    first, second, third, total = str(refused.value).splitlines()
    assert first.startswith(f"{file}, line 7: ")
    assert second.startswith(f"  {file}, line 8: {said}")
    assert third.startswith(f"  {file}, line 9: ")
    assert third.endswith(f"(likewise {', '.join(f'line {n}' for n in range(10, 17))})")
    assert total == "  96 rows cannot be used"
    file.write_text('{"messages": []}\n' * 5000)
    rest = r"none after \S*rows\.jsonl, line 1024 was looked at"
    with pytest.raises(DataError, match=f"; 1,024 rows or more cannot be used: {rest}$"):
        make()


def test_one_run_names_the_bad_rows_of_all_datasets(make: Make, tmp_path: Path) -> None:
    good = json.dumps(chat("How are you?", "Fine."))
    names = ["a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl"]
    bad = [['{"messages": []}'] * 12, [], ["{"], ["[1]"] * 3]
    for name, lines in zip(names, bad, strict=True):
        (tmp_path / name).write_text("\n".join([good, *lines]))
    with pytest.raises(DataError) as refused:
        make(
            datasets=[{"path": str(tmp_path / name)} for name in names[:3]],
            test_datasets=[{"path": str(tmp_path / names[3])}],
        )
    a, c, d, *totals = str(refused.value).splitlines()
    assert a.startswith(f"{tmp_path}/a.jsonl, line 2: the field 'messages' must be")
    assert a.endswith("(likewise line 3, line 4, line 5, line 6, line 7)")  # ten rows in all
    assert c.startswith(f"  {tmp_path}/c.jsonl, line 2: ")
    assert d.startswith(f"  {tmp_path}/d.jsonl, line 2: ")
    assert d.endswith("(likewise line 3, line 4)")
    assert totals == [
        f"  {tmp_path}/{name}: {count} cannot be used"
        for name, count in (("a.jsonl", "12 rows"), ("c.jsonl", "1 row"), ("d.jsonl", "3 rows"))
    ]


def test_what_ends_reading_is_told_with_the_bad_rows_before_it(make: Make, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": []}')
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError) as refused:
        make(datasets=[{"path": str(tmp_path / name)} for name in ("a.jsonl", "b.jsonl")])
    row, total, later = str(refused.value).splitlines()
    assert row.startswith(f"{tmp_path}/a.jsonl, line 1: the field 'messages' must be")
    assert total == f"  {tmp_path}/a.jsonl: 1 row cannot be used"
    assert later.startswith(f"  {tmp_path}/b.jsonl")


def test_datasets_after_a_bad_row_share_what_is_looked_at(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_READ", 0)
    (tmp_path / "a.jsonl").write_text('{"messages": []}')
    write(tmp_path / "b.jsonl", 5)
    with pytest.raises(DataError) as refused:
        make(datasets=[{"path": str(tmp_path / name)} for name in ("a.jsonl", "b.jsonl")])
    assert str(refused.value).splitlines()[1:] == [
        f"  {tmp_path}/a.jsonl: 1 row cannot be used",
        f"  {tmp_path}/b.jsonl: no row was looked at",
    ]


def test_what_comes_after_a_bad_row_is_soon_only_read(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "rows.jsonl", 4000)
    lines = file.read_text().splitlines()
    lines[7] = lines[3000] = '{"messages": []}'
    file.write_text("\n".join(lines))
    tokenized: list[str] = []
    encode = registry.Encoder.encode

    def noted(self: Any, rows: Any) -> Any:
        tokenized.extend(where for where, _ in rows)
        return encode(self, rows)

    monkeypatch.setattr(registry.Encoder, "encode", noted)
    monkeypatch.setattr(workers, "_TOKENIZED", 1)
    for read, said in (
        (2000, f"2 rows or more cannot be used: those after {file}, line 1024 were read, but not"),
        (3, f"1 row or more cannot be used: none after {file}, line 2048 was looked at"),
    ):
        monkeypatch.setattr(workers, "_READ", read)
        tokenized.clear()
        with pytest.raises(DataError) as refused:
            make()
        assert said in str(refused.value)
        assert tokenized[-1] == f"{file}, line 1024"


# --- streams -------------------------------------------------------------------------------------


def test_a_stream_packs_mixes_and_begins_again(make: Make, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", 10, "other")
    keys: dict[str, Any] = {
        "datasets": [{"path": str(tmp_path / "rows.jsonl")}, {"path": str(other)}],
        "streaming": True, "max_steps": 5, "sample_packing": True,
        "streaming_multipack_buffer_size": 50,
    }  # fmt: skip
    prepared = make(**keys, test_datasets=[{"path": str(other)}])
    assert len(prepared.validation["test_1"]) == 10
    stream = prepared.train
    assert isinstance(stream, StreamedPacks)
    seen: list[Sample] = []
    for pack in stream:
        assert sum(len(s.input_ids) for s in pack) <= 128
        seen += pack
        if len(seen) >= 100:
            break
    asked = questions(seen)
    everything = [f"row {i}" for i in range(40)] + [f"other {i}" for i in range(10)]
    assert sorted(asked[:50]) == sorted(asked[50:]) == sorted(everything)
    assert asked[:50] != asked[50:]
    again = [s for pack in islice(iter(stream), 10) for s in pack]
    assert again == seen[: len(again)]
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    spread = [q for pack in islice(loader, 12) for q in questions(pack)]
    assert len(set(spread)) == len(spread)  # no row comes from both processes
    assert make(**{**keys, "sample_packing": False}).train is not None


def test_a_stream_holds_no_more_than_its_buffer(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten million rows could not be read before the first pack: rows are counted as they come."""
    read = 0

    def endless(self: DataSource, progress: Any = None) -> Iterator[tuple[str, Any]]:
        nonlocal read
        for i in range(10_000_000):
            read += 1
            yield f"line {i}", chat("q", "a" * (i % 50))

    monkeypatch.setattr(DataSource, "rows", endless)
    stream = make(
        streaming=True, max_steps=1, sample_packing=True, streaming_multipack_buffer_size=300
    ).train
    used = 0
    for pack in islice(iter(stream), 400):
        used += len(pack)
        assert read - used <= 300 + 2 * 512 + 1  # the buffer, and a batch that is being read


def test_a_stream_counts_what_it_leaves_out(make: Make, tmp_path: Path) -> None:
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps(chat("long", "word " * 500)) + "\n")
    stream = make(streaming=True, max_steps=1, streaming_multipack_buffer_size=50).train
    assert isinstance(stream, StreamedPacks)
    packs = iter(stream)
    for _ in range(40):
        next(packs)
    assert stream.counts == {"rows": 41, "too_long": 1}
    next(packs)  # from the beginning again
    assert stream.counts == {"rows": 82, "too_long": 2}
    tests = [{"path": str(write(tmp_path / "other.jsonl", 3))}]
    counts = make(streaming=True, max_steps=1, test_datasets=tests).counts
    assert rows_message(counts) == "data: a stream; 3 rows for validation"
    message = rows_message({**counts, **stream.counts})
    assert message == "data: 82 rows of the stream were read, 2 too long"


@pytest.mark.parametrize("buffer", [10, 100])  # at the end of the rows, or before
def test_a_stream_whose_answers_have_no_end(make: Make, tmp_path: Path, buffer: int) -> None:
    write(tmp_path / "rows.jsonl", 60)
    stream = make(
        streaming=True, max_steps=1, streaming_multipack_buffer_size=buffer,
        chat_template="jinja", chat_template_jinja="{% for m in messages %}{{ m['role'] + ': ' + "
        "m['content'] + '\n' }}{% endfor %}",
    ).train  # fmt: skip
    with pytest.raises(DataError, match=r"rows\.jsonl: no row trains .*learn to stop"):
        next(iter(stream))


def test_an_end_that_is_rare_in_a_stream(make: Make, tmp_path: Path) -> None:
    """The tool's turn ends otherwise, and comes late: the first buffer does not have it."""
    rows = [chat(f"row {i}?", "yes") for i in range(600)]
    rows[-1]["messages"].append({"role": "tool", "content": "never"})
    write_rows(tmp_path / "rows.jsonl", rows)
    keys: dict[str, Any] = {
        "datasets": [
            {"path": str(tmp_path / "rows.jsonl"), "roles_to_train": ["assistant", "tool"]}
        ],
        "chat_template": "jinja", "eot_tokens": ["<|im_end|>", "<|pad|>"],
        "chat_template_jinja": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + "
        "m['content'] + ('<|pad|>' if m['role'] == 'tool' else '<|im_end|>') }}{% endfor %}",
    }  # fmt: skip
    assert len(make(**keys).train) == 600  # type: ignore[arg-type]
    stream = make(**keys, streaming=True, max_steps=1, streaming_multipack_buffer_size=100).train
    assert len(list(islice(stream, 700))) == 700
    write_rows(tmp_path / "rows.jsonl", rows[:-1])
    stream = make(**keys, streaming=True, max_steps=1, streaming_multipack_buffer_size=100).train
    with pytest.raises(DataError, match=r"no row trains '<\|pad\|>'"):  # at the end it is known
        list(islice(stream, 700))


def test_texts_for_pretraining(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"This is line {i}.\n" for i in range(20)))
    stream = make(
        pretraining_dataset=[{"path": str(path)}], max_steps=2, sample_packing=True,
        streaming_multipack_buffer_size=20,
    ).train  # fmt: skip
    tokenizer = make_tokenizer()
    packs = list(islice(iter(stream), 3))
    texts = [tokenizer.decode(s.input_ids) for pack in packs for s in pack]
    assert all(t.startswith("This is line ") and t.endswith(".<|im_end|>") for t in texts)
    path.write_text("\n")
    with pytest.raises(DataError, match="the dataset is empty"):
        make(pretraining_dataset=[{"path": str(path)}], max_steps=2)


def test_a_cache_that_cannot_be_written_is_named(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(RecipeError, match=r"dataset_prepared_path: .*file/rows"):
        make(dataset_prepared_path=str(tmp_path / "file" / "rows"))


def test_a_curriculum_keeps_the_order(make: Make) -> None:
    prepared = make(val_set_size=8, curriculum_sampling=True, sample_packing=True)
    asked = questions(prepared.train)
    assert asked == sorted(asked, key=lambda q: int(q.split()[1]))
    recipe = Recipe(base_model="x", sequence_len=128, curriculum_sampling=True, sample_packing=True)
    packs = training_sequences(prepared, recipe)
    assert questions([sample for pack in packs for sample in pack]) == asked
    stream = make(streaming=True, max_steps=1, curriculum_sampling=True).train
    assert questions([s for p in islice(stream, 40) for s in p]) == [f"row {i}" for i in range(40)]


def test_texts_to_validate_on_are_cut_to_their_own_length(make: Make, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "word " * 60}) + "\n")
    tests = [{"path": str(tmp_path / "long.jsonl"), "type": "completion"}]
    prepared = make(test_datasets=tests, eval_sequence_len=50)
    assert [len(s.input_ids) for s in prepared.validation["test_1"]][:6] == [50] * 6
