"""``fusewright plan`` as a user calls it: what fits, what does not, and what to do then."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig
from transformers import LlamaConfig, Qwen3MoeConfig
from transformers.models.qwen3_moe import modeling_qwen3_moe

from fusewright.errors import RecipeError
from fusewright.train.plan import page
from fusewright.train.plan.cards import CARDS
from fusewright.train.plan.count.layout import ProcessLayout, layout_of
from fusewright.train.plan.estimate import SPARE, Process, estimate
from fusewright.train.plan.plan import _steps, count_rows, estimate_tokens
from fusewright.train.plan.recommend import advise, faster
from fusewright.train.plan.search import fits, limits
from fusewright.train.plan.speed import head_flops

from ...load import stretched
from ..commands import fusewright, snapshot
from .conftest import LORA, MakeRecipe, make_job

Write = Callable[..., Path]
ONE = ProcessLayout("one process")


@pytest.fixture
def write(config: Path, tmp_path: Path) -> Write:
    """Writes a recipe of the small model."""

    def make(**keys: Any) -> Path:
        given = {
            "base_model": str(config), "datasets": [{"path": "elsewhere.jsonl"}], "bf16": True,
            "sequence_len": 128, "micro_batch_size": 2, "codegen": "eager", "max_steps": 100,
            "output_dir": str(tmp_path / "out"), **keys,
        }  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(given))
        return path

    return make


def test_a_plan_in_words(write: Write, tmp_path: Path) -> None:
    path = write(**LORA)
    before = snapshot(tmp_path)
    result = fusewright("plan", str(path), "--gpus", "2x24GB", "--compare")
    assert result.exit_code == 0, result.output
    for said in ("LoRA", "DDP", "fits: ", "each optimizer step: 512 tokens", "the run: 100 steps",
                 "QLoRA", "ZeRO-3", "Axolotl", "assumed: "):  # fmt: skip
        assert said in result.stdout, said
    assert snapshot(tmp_path) == before


def test_a_plan_as_json(write: Write) -> None:
    result = fusewright("plan", str(write()), "--gpus", "4xH100", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    parts = [v for k, v in found["memory"].items() if k not in ("peak", "host", "levels")]
    assert found["memory"]["peak"] == sum(parts)
    assert found["fits"] is True
    assert found["layout"]["engine"] == "DDP"
    assert found["devices"]["count"] == 4
    assert found["parameters"] == found["trained"] > 0


def test_the_copy_that_async_save_makes_is_counted(write: Write, recipe: MakeRecipe) -> None:
    for keys in ({}, LORA):
        args = "plan", str(write(**keys, async_save=True)), "--gpus", "1x24GB", "--json"
        found = json.loads(fusewright(*args).stdout)
        memory = found["memory"]
        weights = 4 * found["trained"] if keys else 2 * found["parameters"]  # adapters: float32
        assert memory["host"] == weights + memory["optimizer"] > memory["checkpoint"] == 0
    job = replace(make_job(recipe()), copied=1000)  # on a CPU
    copied = estimate(job, ONE, None)
    assert copied.checkpoint == 1000 + copied.optimizer
    assert copied.peak == estimate(replace(job, copied=None), ONE, None).peak + copied.checkpoint
    assert copied.host == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpus", "8xH1000"), "did you mean H100"),
        (("--card", "name=X"), "--card: needs memory"),
        (("--sequence_len", "few"), "sequence_len"),
    ],
)
def test_mistakes_end_in_one_message(words: tuple[str, ...], said: str, write: Write) -> None:
    result = fusewright("plan", str(write()), *words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_too_few_processes_for_the_recipe(write: Write) -> None:
    keys = {
        "fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True},
        "dp_shard_size": 4, "dp_replicate_size": 2,
    }  # fmt: skip
    result = fusewright("plan", str(write(**keys)), "--gpus", "3xH100")
    assert result.exit_code == 2
    assert "dp_shard_size: 4" in result.stderr


# --- what fits ------------------------------------------------------------------------------------


def test_the_limits_are_where_it_stops_to_fit(recipe: MakeRecipe) -> None:
    made = recipe()
    job = make_job(made)
    room = int(2 * estimate(job, ONE, None).peak)
    found = limits(job, made, ONE, room)
    assert fits(job, ONE, room, found.longest_sequence / 128)
    assert not fits(job, ONE, room, (found.longest_sequence + 192) / 128)
    assert fits(job, ONE, room, found.largest_micro_batch / 2)
    assert not fits(job, ONE, room, (found.largest_micro_batch + 2) / 2)
    assert found.smallest_card == 8
    assert found.fewest_devices == 1


def test_blocks_keep_less_where_memory_is_short(recipe: MakeRecipe) -> None:
    made = recipe(sequence_len=2048, memory="auto")
    job = make_job(made)
    whole = estimate(job, ONE, None)
    assert whole.levels == {"all": 4}
    least = min(estimate(job, ONE, None, level=v).peak for v in job.all_levels())
    between = (whole.peak + least) / 2
    tight = estimate(job, ONE, int(between / 0.9))
    assert least <= tight.peak <= between
    assert tight.levels != whole.levels


@pytest.mark.long("activations-1-memory", "optimizer-1-adapter", "optimizer-8-fsdp_config")
@pytest.mark.parametrize(
    ("scarce", "world", "expected"),
    [("optimizer", 1, "adapter"), ("optimizer", 8, "fsdp_config"), ("activations", 1, "memory")],
)
def test_what_does_not_fit_is_told_what_would(
    scarce: str, world: int, expected: str, recipe: MakeRecipe
) -> None:
    made = recipe(sequence_len=4096 if scarce == "activations" else 16, memory="speed")
    job = make_job(made)
    layout = ProcessLayout("DDP", world, replicate=world) if world > 1 else ONE
    whole = estimate(job, layout, None)
    room = int((whole.peak - getattr(whole, scarce) / 2) / 0.9)
    advice = advise(job, made, layout, replace(CARDS["H100"], memory=room), make_job)
    assert expected in advice.keys
    # the recipe with these keys is one, and fits
    changed = recipe(**{"sequence_len": made.sequence_len, "memory": "speed", **advice.keys})
    assert fits(make_job(changed), layout_of(changed, world), room)


@pytest.mark.long
def test_advice_that_is_no_recipe_is_not_given(recipe: MakeRecipe) -> None:
    made = recipe(memory="speed", sequence_len=16, optimizer="came_pytorch")
    job = make_job(made)
    layout = ProcessLayout("DDP", 8, replicate=8)
    whole = estimate(job, layout, None)
    room = int((whole.peak - whole.optimizer / 2) / 0.9)
    advice = advise(job, made, layout, replace(CARDS["H100"], memory=room), make_job)
    assert "fsdp_config" not in advice.keys


@pytest.mark.long
def test_passes_are_put_together_only_where_that_is_faster(recipe: MakeRecipe) -> None:
    """Weights are read in each pass: with few tokens, fewer passes take less time."""
    made = recipe(gradient_accumulation_steps=4)
    job, card = make_job(made), replace(CARDS["H100"], bandwidth=1e6)
    assert faster(job, made, ONE, card).keys == {
        "micro_batch_size": 8, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    assert not faster(job, made, ONE, replace(card, bandwidth=1e30)).keys
    assert list(advise(job, made, ONE, card, make_job).table) == ["full", "LoRA", "QLoRA"]


# --- what recipes change --------------------------------------------------------------------------


def test_without_rewrites_nothing_is_planned_and_logits_are_whole(recipe: MakeRecipe) -> None:
    plain, ours = make_job(recipe(optimize=False)), make_job(recipe())
    assert plain.all_levels() == ("all",)
    assert make_job(recipe(optimize=False, gradient_checkpointing=True)).all_levels() == ("input",)
    assert plain.logits_bytes(1000) == 12 * 256 * 512 * 1000
    assert ours.logits_bytes(1000) == 128 << 20
    on_a_gpu = replace(ours, process=replace(ours.process, is_host=False))
    assert on_a_gpu.logits_bytes(10_000) == 256 << 20
    assert estimate(plain, ONE, None).activations > estimate(ours, ONE, None).activations


@pytest.mark.long
def test_weights_that_train_in_float16_have_32_bits(write: Write) -> None:
    full, lora = (
        json.loads(
            fusewright(
                "plan", str(write(bf16=False, fp16=True, **more)), "--gpus", "1x24GB", "--json"
            ).stdout
        )
        for more in ({}, LORA)
    )
    assert full["memory"]["weights"] == pytest.approx(4 * full["parameters"], rel=0.01)
    assert lora["memory"]["weights"] < 3 * lora["parameters"]


@pytest.mark.long
def test_a_copy_of_the_head_that_is_trained_counts_once(recipe: MakeRecipe) -> None:
    plain = make_job(recipe(**LORA))
    saved = make_job(recipe(**LORA, lora_modules_to_save=["lm_head"]))
    assert head_flops(saved, 256) == 3 / 2 * head_flops(plain, 256) == 6 * 256 * 512 * 64


@pytest.mark.long("pissa", "olora")
@pytest.mark.parametrize("initial", ["pissa", "olora"])
def test_adapters_that_begin_from_the_weights(initial: str, recipe: MakeRecipe) -> None:
    job = make_job(recipe(**LORA, peft_init_lora_weights=initial))
    assert any(w.trains for u in job.units for w in u.weights)


def test_an_adapter_to_train_on(recipe: MakeRecipe, tmp_path: Path) -> None:
    LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(
        tmp_path / "a"
    )
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"")
    job = make_job(recipe(adapter="lora", lora_model_dir=str(tmp_path / "a")))
    trained = sum(u.times * w.numbers for u in job.units for w in u.weights if w.trains)
    assert trained == 4 * 4 * (64 + 64)


_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
PACKED: dict[str, tuple[dict[str, Any], float]] = {  # bits a weight, scales included
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 64}, 4 + 20 / 64),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [16, 16]}, 8 + 32 / 256),
    "int4": (
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": _INT4}},
         "ignore": ["lm_head", "re:.*down_proj"]}, 4 + 16 / 32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PACKED)
def test_weights_of_a_packed_checkpoint_are_counted_so(
    name: str, recipe: MakeRecipe, config: Path
) -> None:
    plain = make_job(recipe(**LORA))
    path, (saved, bits) = config / "config.json", PACKED[name]
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": saved}))
    job = make_job(recipe(**LORA, memory="speed"))

    def weights(job: Any) -> int:
        return estimate(job, ONE, None).weights

    packed = [w for u in job.units for w in u.weights for _ in range(u.times) if w.scales]
    whole = sum(w.numbers * w.itemsize for w in packed)
    assert weights(plain) - weights(job) == pytest.approx(
        whole - sum(w.numbers * bits / 8 for w in packed), abs=8 * len(packed)
    )
    linears = [m for n, m in job.blueprint.model.named_modules() if "base_layer" in n]
    assert len({w.numbers for w in packed}) <= len({m.weight.numel() for m in linears})
    fastest, lean = (estimate(job, ONE, None, level=v) for v in ("weights", "all"))
    assert fastest.activations - lean.activations == whole
    assert list(estimate(job, ONE, None).levels) == ["weights"]
    with pytest.raises(RecipeError, match="cannot be trained: set adapter"):
        make_job(recipe())


def test_a_packed_form_that_is_not_known_is_refused(recipe: MakeRecipe, config: Path) -> None:
    path = config / "config.json"
    given = json.loads(path.read_text())
    path.write_text(json.dumps({**given, "quantization_config": {"quant_method": "quark"}}))
    with pytest.raises(RecipeError, match="stored by quark, in a form that plan cannot count"):
        make_job(recipe(**LORA))


MOE: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4,
    "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "architectures": ["Qwen3MoeForCausalLM"],
}  # fmt: skip


@pytest.mark.long
def test_experts_of_4_bits(recipe: MakeRecipe, tmp_path: Path) -> None:
    Qwen3MoeConfig(**MOE).save_pretrained(tmp_path / "moe")
    keys = {
        "base_model": str(tmp_path / "moe"), "adapter": "qlora", "load_in_4bit": True,
        "lora_target_modules": ["q_proj"],
    }  # fmt: skip
    dense, packed = (
        make_job(recipe(**keys, quantize_moe_experts=experts)) for experts in (False, True)
    )
    own = 4 * 3 * 8 * 64 * 32 * 2  # blocks, matrices, experts, sizes, bytes
    saved = estimate(dense, ONE, None).weights - estimate(packed, ONE, None).weights
    assert saved == pytest.approx(own * (1 - 0.258), rel=0.02)


@pytest.mark.long
def test_blocks_that_cannot_be_captured_are_counted_as_they_run(
    recipe: MakeRecipe, tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router that may not be traced makes its block one that is not captured as a whole."""
    router = modeling_qwen3_moe.Qwen3MoeTopKRouter
    monkeypatch.setattr(router, "forward", torch._dynamo.disable(router.forward))
    Qwen3MoeConfig(**MOE).save_pretrained(tmp_path / "moe")
    keys = {"base_model": str(tmp_path / "moe"), **LORA}
    job = make_job(recipe(**keys))
    assert job.step.uncaptured
    assert estimate(job, ONE, None).activations > 0
    said = fusewright("plan", str(write(**keys)), "--gpus", "24GB")
    assert said.exit_code == 0, said.output
    assert "runs as it is: " in said.stdout
    assert "launching kernels is not counted: so small a model" in said.stdout


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_adapters_of_experts(dtype: torch.dtype, recipe: MakeRecipe, tmp_path: Path) -> None:
    Qwen3MoeConfig(**MOE).save_pretrained(tmp_path / "moe")
    job = make_job(recipe(base_model=str(tmp_path / "moe"), **LORA), dtype)
    assert job.step.uncaptured == {}
    assert job.step.rewrites["moe_experts"] == 2


@pytest.mark.long("qlora")
@pytest.mark.parametrize("method", ["full", "qlora"])
def test_what_fits_stays_below_what_a_run_may_take(method: str, recipe: MakeRecipe) -> None:
    """The verdict asks whether the leanest plan fits; the plan that is shown is another one."""
    keys = {**LORA, "adapter": "qlora", "load_in_4bit": True} if method == "qlora" else {}
    job = make_job(recipe(sequence_len=2048, memory="auto", **keys))
    least = min(estimate(job, ONE, None, level=v).peak for v in job.all_levels())
    for room in range(int(least / SPARE) - 100_000, 4 * least, least // 7):
        if fits(job, ONE, room):
            assert estimate(job, ONE, room).peak <= SPARE * room


def test_an_estimate_has_two_digits() -> None:
    seconds = (33.62, 2.31, 0.00471, 0.0, 119.6, 600.0)
    assert [page._time(s) for s in seconds] == [
        "34 s", "2.3 s", "0.0047 s", "0 s", "120 s", "10 min",
    ]  # fmt: skip
    speed = SimpleNamespace(
        sent=0, flops=3.14e7, seconds=2e-5, tokens=16, tokens_per_second=8e5, compute_seconds=2e-5,
        network_seconds=0.0,
    )  # fmt: skip
    plan = SimpleNamespace(speed=speed, on_cpu=True, hours=None, steps=None)
    assert page._work(plan)[:2] == [  # type: ignore[arg-type]
        "each optimizer step: 16 tokens in all; 0.000031 TFLOP by each process",
        "about 0.000020 s for a step on a machine that does nothing else, 800,000 tokens/s in all",
    ]


def test_a_length_beyond_the_positions_is_warned_of() -> None:
    def warned(length: int, positions: int | None) -> list[str]:
        limits, recipe = SimpleNamespace(positions=positions), SimpleNamespace(sequence_len=length)
        return page._beyond(SimpleNamespace(limits=limits, recipe=recipe))

    assert warned(8192, 8192) == warned(20_000, None) == []
    (line,) = warned(20_000, 8192)
    assert line.startswith("warning: sequence_len: 20,000 is more than the 8,192 positions of the")


def test_rows_that_are_not_packed_are_counted(recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n' * 1000)
    given = [{"path": str(rows), "type": "completion"}]
    made = recipe(datasets=given, val_set_size=100, num_epochs=3)
    assert count_rows(made) == 900
    layout = SimpleNamespace(data_ranks=7)  # 14 rows a step: 65 steps an epoch, the last with four
    assert _steps(made.model_copy(update={"max_steps": None}), 0, layout) == 195
    assert count_rows(recipe()) is None


def test_a_process_of_its_own_counts(recipe: MakeRecipe) -> None:
    job = make_job(recipe())
    more = replace(job, process=Process(1000, 10, 0.0, is_host=True))
    assert estimate(more, ONE, None).peak == estimate(job, ONE, None).peak + 1010


# --- large models ---------------------------------------------------------------------------------

_LARGE = {
    "8B": (4096, 14336, 32, 32), "70B": (8192, 28672, 80, 64), "405B": (16384, 53248, 126, 128),
}  # fmt: skip


def _large(folder: Path, name: str) -> tuple[Path, int]:
    """A recipe of a large Llama, and how many parameters that has."""
    hidden, inner, depth, heads = _LARGE[name]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=depth,
        num_attention_heads=heads, num_key_value_heads=8, vocab_size=128256,
        tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder / name)
    keys = {
        "base_model": str(folder / name), "datasets": [{"path": "x.jsonl"}], "bf16": True,
        "sequence_len": 4096, "fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True},
        "output_dir": str(folder / "out"), "codegen": "eager",
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(keys))
    kv = 8 * hidden // heads
    block = 2 * hidden**2 + 2 * hidden * kv + 3 * hidden * inner + 2 * hidden
    return path, depth * block + 2 * 128256 * hidden + hidden


@pytest.mark.long
def test_a_large_model_takes_no_memory_to_plan(tmp_path: Path) -> None:
    path, parameters = _large(tmp_path, "405B")
    code = (
        "import sys\n"
        "from fusewright.cli import main\n"
        f"sys.argv = ['fusewright', 'plan', {str(path)!r}, '--gpus', '1024xH100', '--json']\n"
        "try:\n    main()\n"
        "finally:\n"
        "    from fusewright.train.report.environment import peak_rss_mb\n"
        "    print(peak_rss_mb(), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=stretched(300),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["parameters"] == parameters
    assert found["depth"] == 126
    assert found["fits"] is True
    shard = 2 * parameters / 1024
    assert found["memory"]["weights"] == pytest.approx(shard, rel=0.01)
    assert float(done.stderr.split()[-1]) < 2048  # MiB


def test_the_length_of_a_run_by_the_size_of_its_files(recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}\n' * 1000)  # 42 bytes each
    given = [{"path": str(rows), "type": "completion"}]
    assert estimate_tokens(recipe(datasets=given)) == 10_500
    assert estimate_tokens(recipe(datasets=given, val_set_size=0.5)) == 5_250
    assert estimate_tokens(recipe(datasets=[{**given[0], "weight": 2.0}])) == 21_000
    assert estimate_tokens(recipe()) is None
