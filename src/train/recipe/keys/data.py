"""The keys of the data as a whole: which rows, how long, how they are put together."""

from __future__ import annotations

from typing import Literal

from .base import METHOD, VALIDATION, Float, Int, Keys, key
from .dataset import Dataset, PretrainingDataset

_STREAM = "pretraining_dataset or streaming"
_NOT_STREAMED = "rows of {key} are not streamed: use datasets, without streaming"
_TEACHER_NOT_STREAMED = "rows with a teacher are not streamed: use datasets, without streaming"
_NOT_PACKED = "rows of {key} are not packed: leave it out, or set it to false"
_ALL_ROWS = "needs all rows at once, which a stream ({key}) never has"
_UNSORTED = "streamed rows cannot be sorted or counted in advance"


class DataKeys(Keys):
    """The rows, and the sequences that are made of them."""

    datasets: list[Dataset] = key([], min_length=1)
    """The rows to train on, from one or several places. A relative path is looked for next to the
    recipe, then in the current folder. Unset: see ``pretraining_dataset``."""

    test_datasets: list[Dataset] = key([], min_length=1)
    """The rows to validate on, each dataset by itself. Unset: see ``val_set_size``."""

    pretraining_dataset: list[PretrainingDataset] = key(
        [],
        min_length=1,
        excludes={
            "datasets": "set this or datasets, not both: only one of them is trained on; "
            "to read datasets as a stream, set streaming: true",
            METHOD: _NOT_STREAMED,
            "kd_trainer": _TEACHER_NOT_STREAMED,
        },
    )
    """Text that is streamed during training, instead of ``datasets``. Needs ``max_steps``. Unset:
    none."""

    val_set_size: Float = key(
        0.0,
        ge=0,
        excludes={
            "test_datasets": "set this or test_datasets, not both",
            _STREAM: "cannot be cut from a stream ({key}): use test_datasets",
        },
    )
    """Rows held out for validation: a fraction below 1, or a number of rows. 0: none."""

    streaming: bool = key(
        False, excludes={METHOD: _NOT_STREAMED, "kd_trainer": _TEACHER_NOT_STREAMED}
    )
    """Read ``datasets`` as a stream, too. Needs ``max_steps``."""

    streaming_multipack_buffer_size: Int = key(
        10_000, gt=0, aliases=["pretrain_multipack_buffer_size"]
    )
    """Rows of a stream that are buffered and packed together."""

    # --- preparation -----------------------------------------------------------------------------

    dataset_prepared_path: str | None = key(resumable=True)
    """Folder of prepared rows, which later runs take from there. Unset: ``last_run_prepared`` for
    ``fusewright preprocess``, and for a run if it is there; otherwise nothing is kept."""

    dataset_processes: Int | None = key(gt=0, aliases=["dataset_num_proc"], resumable=True)
    """Processes that prepare rows. Unset: only the main process, where the tokenizer uses all
    cores. More pay off from about 100,000 rows."""

    dataset_exact_deduplication: bool = key(False, excludes={_STREAM: _ALL_ROWS})
    """Remove duplicate rows."""

    skip_prepare_dataset: bool = key(
        False,
        excludes={
            METHOD: "rows of {key} are always tokenized: leave it out",
            "kd_trainer": "rows with a teacher are always tokenized: leave it out",
        },
    )
    """The rows are already tokenized: they have ``input_ids`` and ``labels``. Beside
    ``processor_type`` it says nothing, as Axolotl's recipes for images have it."""

    dataset_shard_num: Int | None = key(gt=0, if_written=True, excludes={_STREAM: _ALL_ROWS})
    """Split all rows into this many shards and use one. Unset: use all."""

    dataset_shard_idx: Int = key(0, ge=0, needs=["dataset_shard_num"])
    """Index of the shard that is used, from 0."""

    shuffle_merged_datasets: bool = True
    """Shuffle the rows of all datasets together."""

    shuffle_before_merging_datasets: bool = False
    """Shuffle each dataset before they are merged."""

    # --- sequences -------------------------------------------------------------------------------

    sequence_len: Int = key(512, gt=1)
    """Longest row, and the size of a pack, in tokens."""

    eval_sequence_len: Int | None = key(gt=1, read_with=VALIDATION, resumable=True)
    """The same for validation. Unset: ``sequence_len``."""

    min_sample_len: Int | None = key(gt=0)
    """Shortest row, in tokens; shorter ones are left out. Unset: 2, or 1 for rows that are
    prompts (``rl: grpo``, ``gdpo``)."""

    max_prompt_len: Int | None = key(
        read_with={METHOD: "only a preference method (key rl) reads it"}
    )
    """Longest prompt of a preference, in tokens; with ``excess_length_strategy: truncate``, longer
    ones lose their beginning. Unset: ``sequence_len``."""

    excess_length_strategy: Literal["drop", "truncate", "raise"] = "drop"
    """What happens to a row of more than ``sequence_len`` tokens."""

    sample_packing: bool = key(False, excludes={METHOD: _NOT_PACKED})
    """Pack several rows into one sequence; each attends only to itself and starts at position 0."""

    eval_sample_packing: bool | None = key(
        excludes={METHOD: _NOT_PACKED}, read_with=VALIDATION, resumable=True
    )
    """The same for validation. Unset: as ``sample_packing``."""

    sample_packing_group_size: Int = key(100_000, gt=0, unread_with={_STREAM: _UNSORTED})
    """Number of rows that are packed at a time; more rows pack tighter."""

    sample_packing_bin_size: Int = key(200, gt=0)
    """Most rows in one sequence."""

    sample_packing_sequentially: bool = key(False, unread_with={_STREAM: _UNSORTED})
    """Pack rows in their original order."""

    pad_to_sequence_len: bool | None = None
    """Pad every sequence to ``sequence_len``. Unset: only where it makes the run faster."""

    curriculum_sampling: bool = False
    """Do not shuffle the training rows."""

    group_by_length: bool = key(
        False,
        unread_with={
            "sample_packing": "sample_packing leaves no padding to save",
            _STREAM: _UNSORTED,
        },
    )
    """Put rows of similar length into a batch, to save padding."""

    train_on_inputs: bool = key(
        False, unread_with={METHOD: "only answers are compared, never prompts"}
    )
    """Train every token, not only the assistant's."""

    eot_tokens: list[str] | None = None
    """Tokens that end a turn, where that is not the end-of-text token. Unset: that one."""

    # --- loading ---------------------------------------------------------------------------------

    dataloader_num_workers: Int = key(0, ge=0, resumable=True)
    """Dataloader worker processes; 0: the main process. Unset: for images on a GPU, up to 4."""

    dataloader_prefetch_factor: Int | None = key(gt=0, resumable=True)
    """Batches that each worker prefetches. Unset: torch's default."""

    dataloader_pin_memory: bool | None = key(resumable=True)
    """Put batches into pinned memory, for faster copies to the GPU. Unset: where there is a GPU."""

    dataloader_drop_last: bool = False
    """Drop the last batch if it is not full."""

    # --- positions -------------------------------------------------------------------------------
