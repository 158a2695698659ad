"""The keys of one entry of ``datasets``: where its rows are, and how they are read."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import Float, Int, Keys, PositiveFloat, key


class PromptFormat(Keys):
    """A ``type`` that is spelled out: which fields a row has, and the text that they make."""

    system_prompt: str | None = None
    """The system message of every row. Unset: none."""

    system_format: str | None = None
    """How the system message is written; ``{system}`` is replaced by it. Unset: as it is."""

    field_system: str | None = None
    """The field of a row that holds its system message. Unset: ``system``."""

    field_instruction: str | None = None
    """The field with the instruction. Unset: ``instruction``."""

    field_input: str | None = None
    """The field with the input that the instruction is about. Unset: ``input``."""

    field_output: str | None = None
    """The field with the answer. Unset: ``output``."""

    field_prompt: str | None = None
    """The field with the prompt of a preference. Unset: ``prompt``."""

    field_chosen: str | None = None
    """The field with the better answer. Unset: ``chosen``."""

    field_rejected: str | None = None
    """The field with the worse answer. Unset: ``rejected``."""

    field_completion: str | None = None
    """The field with a judged answer. Unset: ``completion``."""

    field_label: str | bool | None = None
    """The field with its label: true for a desirable answer. Unset: ``label``."""

    prompt_format: str | None = None
    """The form of a prompt; ``{prompt}`` and ``{system}`` are the fields. Unset: the prompt
    as it is."""

    chosen_format: str | None = None
    """The form of the better answer, with ``{chosen}`` in it. Unset: as it is."""

    rejected_format: str | None = None
    """The form of the worse answer, with ``{rejected}`` in it. Unset: as it is."""

    completion_format: str | None = None
    """The form of a judged answer, with ``{completion}`` in it. Unset: as it is."""

    format: str | None = None
    """The prompt; ``{instruction}`` and ``{input}`` are the fields. Unset: these two as they
    are."""

    no_input_format: str | None = None
    """The prompt of a row without input; ``{instruction}`` only. Unset: ``format``."""


class Dataset(Keys):
    """One entry of ``datasets`` or ``test_datasets``."""

    path: str
    """A ``.jsonl``, ``.json``, ``.csv``, ``.parquet``, ``.arrow`` or ``.txt`` file, a folder of
    such files or one that ``datasets`` has saved, the id of a dataset on the hub, or rows about the
    docstrings of Python's library, made on the spot: ``fusewright:docstrings`` (chats),
    ``fusewright:docstring_pairs`` (the right answer and another one's) or
    ``fusewright:docstring_prompts`` (questions alone)."""

    builder: str | None = None
    """A Python file that makes ``path`` when that is missing or older than this file: it is run as
    ``python BUILDER PATH`` and must write ``path``, and needs ``--allow-builders`` on the command
    line. Unset: a missing file is an error."""

    type: str | PromptFormat = "chat_template"
    """How a row is read: ``chat_template`` renders its messages; ``alpaca`` and its variants,
    ``completion``, ``input_output``, ``prompt_completion``; or the format spelled out as keys. For
    distillation, ``axolotl.integrations.kd.chat_template``: messages with a teacher's part."""

    name: str | None = None
    """Which configuration of a dataset on the hub. Unset: its only one."""

    split: str | None = None
    """Which split of the dataset, e.g. ``train`` or ``train[:10%]``. Unset: ``train``."""

    data_files: str | list[str] | None = None
    """Which files of a folder or of a dataset on the hub. Unset: all."""

    ds_type: Literal["json", "csv", "parquet", "arrow", "text"] | None = None
    """The kind of a file. Unset: by the end of its name."""

    revision: str | None = None
    """Branch, tag or commit of a dataset on the hub. Unset: its main branch."""

    shards: Int | None = key(gt=0, if_written=True)
    """Cut the dataset into so many parts and use one. Unset: use all of it."""

    shards_idx: Int = key(0, ge=0, if_written=True, needs=["shards"])
    """Which of the ``shards`` is used, from 0."""

    # --- chats -----------------------------------------------------------------------------------

    chat_template: str | None = None
    """The template of this dataset's chats. Unset: the recipe's."""

    chat_template_jinja: str | None = None
    """The same as Jinja text or the path of a file. Unset: see ``chat_template``."""

    field_messages: str = "messages"
    """The field of a row that holds its list of messages."""

    images_dir: str | None = None
    """The folder in which relative paths of images begin, and which none may leave. Unset: that of
    the dataset's file."""

    field_tools: str = "tools"
    """The field of a row that holds its list of tools, as JSON schemas."""

    field_thinking: str = "reasoning_content"
    """The field of a message that holds the reasoning before the answer."""

    field_chosen: str | None = None
    """The field of a row that holds the better answer. Unset: the type's own, ``chosen``."""

    field_rejected: str | None = None
    """The field of a row that holds the worse answer. Unset: the type's own, ``rejected``."""

    template_thinking_key: str | None = None
    """The name that the template has for the reasoning. Unset: ``field_thinking``."""

    split_thinking: bool = False
    """Take the reasoning in ``<think>`` marks out of the answer, and give it to the template."""

    message_property_mappings: dict[str, str] = Field(default_factory=dict)
    """The names of a message's fields, where they are not ``role`` and ``content``, e.g.
    ``{role: from, content: value}``."""

    message_field_role: str | None = key(
        if_written=True, excludes=["message_property_mappings.role"]
    )
    """The older way to say ``message_property_mappings.role``. Unset: ``role``."""

    message_field_content: str | None = key(
        if_written=True, excludes=["message_property_mappings.content"]
    )
    """The older way to say ``message_property_mappings.content``. Unset: ``content``."""

    message_field_training: str | None = None
    """The field of a message that says, as a boolean, whether it is trained. Unset: by role."""

    message_field_training_detail: str | None = None
    """The field of a message that lists which of its characters are trained:
    ``begin_offset``, ``end_offset`` and ``train`` of each piece. Unset: all."""

    roles: dict[str, list[str]] | None = None
    """The names that rows use for each role of the template, e.g. ``{assistant: [gpt, model]}``.
    Unset: the usual ones (human, gpt, ...)."""

    roles_to_train: list[str] = Field(default_factory=lambda: ["assistant"])
    """Whose messages are trained."""

    train_on_eos: Literal["all", "turn", "last", "none"] = "turn"
    """Which ends of turns are trained: ``all``, those of trained turns, only the ``last``, or
    ``none``."""

    train_on_eot: Literal["all", "turn", "last", "none"] | None = None
    """The same for ``eot_tokens``. Unset: as ``train_on_eos``."""

    eot_tokens: list[str] | None = None
    """Tokens that end a turn, where that is not the end-of-text token. Unset: the recipe's."""

    drop_system_message: bool = False
    """Leave out the system messages of the rows."""

    # --- other rows ------------------------------------------------------------------------------

    field: str | None = None
    """For ``completion``: the field with the text. Unset: ``text``."""

    field_human: str | None = None
    """For prompts and completions: the field with the prompt. Unset: the type's own."""

    field_model: str | None = None
    """For prompts and completions: the field with the answer. Unset: the type's own."""

    field_system: str | None = None
    """The field with the system message. Unset: the type's own."""

    field_instruction: str | None = None
    """The field with the instruction. Unset: the type's own."""

    field_input: str | None = None
    """The field with the input of the instruction. Unset: the type's own."""

    field_output: str | None = None
    """The field with the answer. Unset: the type's own."""

    input_format: str | None = None
    """For ``alpaca`` and its variants: the prompt; ``{instruction}`` and ``{input}`` are the
    fields, other braces are written twice. It holds for rows without input too, where ``{input}``
    is empty; for another prompt there, spell ``type`` out, with ``format`` and ``no_input_format``.
    Unset: the type's own two prompts."""

    train_on_inputs: bool | None = None
    """Train every token of this dataset. Unset: as the recipe's ``train_on_inputs``."""

    weight: Float | None = key(gt=0)
    """How often a row is seen per epoch: 0.5 takes half of the rows, 2 takes each twice. Unset:
    once."""

    skip: Int = key(0, ge=0)
    """Rows to leave out at the beginning."""

    step_separator: str | None = None
    """What separates the steps of reasoning. Unset: a line break."""

    max_completion_length: Int | None = None
    """Longest answer, in tokens. Unset: none."""

    train_on_last_step_only: bool | None = None
    """Judge the last step only. Unset: all."""

    logprobs_field: str | None = None
    """For distillation: the field with a teacher's log-probabilities. Unset: ``logprobs``, or else
    ``llm_text_generation_vllm_logprobs``."""

    temperature: PositiveFloat | None = None
    """For distillation: the temperature of these log-probabilities. Unset: 1."""


class PretrainingDataset(Dataset):
    """One entry of ``pretraining_dataset``: texts that are read during training."""

    type: str | PromptFormat = "pretrain"
    """How a row is read: ``pretrain`` takes its text as it is."""

    split: str | None = "train"
    """Which split of the dataset."""

    text_column: str = "text"
    """The field of a row that holds its text."""
