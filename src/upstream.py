"""The names of other libraries that are used and not public, so that any release may change them.

A part of fusewright whose names are gone is left out, with a reason: the model runs as it was, in
eager code; a training run, which needs its names, says so and does not
start. Nothing else asks whether such a name is there.
"""

from __future__ import annotations

import dis
import functools
import importlib
import importlib.metadata
import importlib.util
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from .errors import OptimizeError
from .packages import install_extra
from .report import Bypass, Report

PARTS: dict[str, dict[str, str]] = {
    "the compiler": {
        "torch": "_foreach_copy_ _grouped_mm",
        "torch.Tensor": "_is_zerotensor _make_wrapper_subclass",
        "torch._C": (
            "DisableTorchFunctionSubclass _are_functorch_transforms_active "
            "_current_graph_task_id _disabled_torch_function_impl _get_dispatch_mode "
            "_get_tracing_state _is_any_autocast_enabled _is_fwd_grad_enabled "
            "_len_torch_dispatch_stack _len_torch_function_stack _set_grad_enabled"
        ),
        "torch._C._TorchDispatchModeKey": "FAKE FUNCTIONAL PROXY",
        "torch._C._autograd": (
            "_get_current_graph_task_keep_graph _profiler_enabled "
            "_saved_tensors_hooks_get_disabled_error_message "
            "_saved_tensors_hooks_is_enabled _top_saved_tensors_default_hooks"
        ),
        "torch._C._functorch": "is_legacy_batchedtensor",
        "torch._C._nn": "gelu linear",
        "torch._dynamo": (
            "allow_in_graph assume_constant_result disable maybe_mark_dynamic optimize"
        ),
        "torch._dynamo.config": (
            "allow_unspec_int_on_nn_module fake_tensor_cache_enabled ignore_logger_methods patch "
            "recompile_limit specialize_float"
        ),
        "torch._dynamo.eval_frame._TorchDynamoContext": "callback",
        "torch._dynamo.exc": "FailOnRecompileLimitHit TorchDynamoException",
        "torch._dynamo.variables.builder.GraphArg": "erase",
        "torch._functorch.pyfunctorch": "temporarily_clear_interpreter_stack",
        "torch._guards": "tracing",
        "torch._guards.TracingContext": "get_traced_code try_get",
        "torch._logging._internal": "log_state",
        "torch._ops": "HigherOrderOperator OpOverload OpOverloadPacket",
        "torch._subclasses.fake_tensor": "FakeTensor FakeTensorMode",
        "torch.autograd.forward_ad": "_current_level",
        "torch.compiler": "_is_compiling_flag",
        "torch.cpu": "_is_amx_tile_supported _is_avx512_bf16_supported",
        "torch.fx.Node": "_erased",
        "torch.fx._lazy_graph_module": "_LazyGraphModule",
        "torch.fx._symbolic_trace": "is_fx_symbolic_tracing",
        "torch.nn.Module": (
            "_backward_hooks _backward_pre_hooks _call_impl _forward_hooks "
            "_forward_hooks_with_kwargs _forward_pre_hooks _forward_pre_hooks_with_kwargs "
            "_replicate_for_data_parallel"
        ),
        "torch.nn.modules.module": (
            "_global_backward_hooks _global_backward_pre_hooks _global_forward_hooks "
            "_global_forward_pre_hooks"
        ),
        "torch.ops.aten": (
            "_fused_rms_norm _fused_rms_norm_backward _log_softmax_backward_data "
            "_scaled_dot_product_flash_attention_for_cpu "
            "_scaled_dot_product_flash_attention_for_cpu_backward _softmax_backward_data _to_copy "
            "_unsafe_view"
        ),
        "torch.overrides": "_get_current_function_mode_stack",
        "torch.utils._python_dispatch": (
            "TorchDispatchMode _disable_current_modes is_traceable_wrapper_subclass"
        ),
        "torch.utils._pytree": "tree_iter tree_map tree_map_only",
    },
    "Inductor": {
        "torch._functorch": "config",
        "torch._functorch.aot_autograd": "aot_module_simplified",
        "torch._functorch.partitioners": "min_cut_rematerialization_partition",
        "torch._inductor.async_compile": "AsyncCompile",
        "torch._inductor.codecache": "",
        "torch._inductor.compile_fx": "compile_fx compile_fx_inner",
        "torch._inductor.config": "_pre_fusion_custom_pass patch",
        "torch._inductor.cpu_vec_isa": "",
        "torch._inductor.decomposition": "select_decomp_table",
        "torch._inductor.dependencies": "WeakDep",
        "torch._inductor.ir": "FallbackKernel",
        "torch._inductor.runtime.cache_dir_utils": "cache_dir",
    },
    "FSDP2": {
        "torch.distributed.fsdp.FSDPModule": "_get_fsdp_state",
        "torch.distributed.fsdp._fully_shard._fsdp_param.FSDPParam": "_unsharded_param",
        "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState": (
            "_fsdp_param_group|_fsdp_param_groups _modules _mp_policy _state_ctx"
        ),
        "torch.distributed.tensor.DTensor": "_local_tensor",
        "torch.distributed.distributed_c10d": "PrefixStore _get_default_store",
    },
    "DeepSpeed": {
        "deepspeed.runtime.zero.partition_parameters.Init": (
            "all_gather ds_id ds_process_group ds_shape ds_status partition"
        ),
    },
    "adapters of parameters": {
        "peft.tuners.lora.layer.ParamWrapper": "_check_forward_args _did_swap_in_out_features",
    },
    "training": {
        "accelerate.state.AcceleratorState": "_reset_state _shared_state",
        "accelerate.state.PartialState": "_shared_state",
        "torch.distributed._functional_collectives": "all_gather_tensor_autograd",
        "torch.optim.Optimizer": "_patch_step_function",
        "transformers.PreTrainedModel": "_from_config _supports_sdpa _tied_weights_keys",
        "transformers.PreTrainedConfig": "_attn_implementation _experts_implementation",
        "transformers.Trainer": (
            "_get_num_items_in_batch _save_rng_state _save_scaler _train_batch_size"
        ),
        "transformers.TrainingArguments": "_n_gpu",
        "transformers.integrations.deepspeed": "_hf_deepspeed_config_weak_ref",
    },
    "GRPO": {
        "trl.GRPOTrainer": (
            "_buffered_inputs _calculate_rewards _current_train_step_time "
            "_generate_and_score_completions _generate_single_turn _last_world_entropy _logs "
            "_metrics _prepare_inputs _step _tokenize_prompts"
        ),
    },
    "stored scales": {  # without which compressed-tensors does by itself what is faster here
        "compressed_tensors.compressors.MXFP4PackedCompressor": "_compress_scale _decompress_scale",
        "compressed_tensors.compressors.MXFP8QuantizationCompressor": (
            "_compress_scale _decompress_scale"
        ),
        "compressed_tensors.compressors.NVFP4PackedCompressor": "_compress_scale _decompress_scale",
    },
    "AdEMAMix": {
        "bitsandbytes.optim.ademamix.AdEMAMix": "_get_state_double_buffer",
    },
    "tools": {  # the audit, doctor, plan and proof: each says so and ends
        "torch": "_foreach_norm",
        "torch._C._distributed_c10d": "HashStore",
        "torch._inductor": "cpp_builder",
        "torch._subclasses.fake_tensor": (
            "DataDependentOutputException DynamicOutputShapeException unset_fake_temporarily"
        ),
        "torch.nn.modules.dropout": "_DropoutNd",
        "transformers.Trainer": "_clip_grad_norm _get_grad_norm",
    },
}
"""Part -> what the names are in -> the names; of ``a|b``, one is enough."""


@functools.cache
def changed(part: str) -> str | None:
    """Why a part of fusewright cannot run with the installed libraries; None: it can.

    It imports what the names are in. A library that is not there has changed nothing.
    """
    for place, name in names_of(part):
        library = place.partition(".")[0]
        if importlib.util.find_spec(library) is not None and not _has(_found(place), name):
            return (
                f"{library} {importlib.metadata.version(library)} has no {place}.{name}, which is "
                f"not public, and which the versions that were tested have: "
                f"{install_extra('tested')}"
            )
    return None


def names_of(part: str) -> Iterator[tuple[str, str]]:
    """Each name that a part needs, after what it is in."""
    for place, names in PARTS[part].items():
        for name in names.split():
            yield place, name


def _found(place: str) -> Any:
    """The module or object of a dotted name; None where there is none."""
    parts = place.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(lambda o, name: getattr(o, name, None), parts[n:], found)
    return None


def _has(owner: Any, name: str) -> bool:
    """Whether an object has an attribute; of a class also: whether its instances have one."""
    kinds = owner.__mro__ if isinstance(owner, type) else ()
    return any(
        hasattr(owner, one) or any(one in _set_by(kind) for kind in kinds)
        for one in name.split("|")
    )


def _set_by(kind: type) -> set[str]:
    """The attributes that a class declares, or that the code of its methods sets."""
    found = {*vars(kind).get("__annotations__", ())}
    for value in vars(kind).values():
        function = value  # or what a property or a decorator is made of
        for name in ("fget", "func", "__wrapped__"):
            function = getattr(function, name, None) or function
        if isinstance(function, types.FunctionType):
            steps = dis.get_instructions(function.__code__)
            found.update(str(step.argval) for step in steps if step.opname == "STORE_ATTR")
    return found


def verbs(reason: str) -> dict[str, Callable[..., Any]]:
    """The verbs where the compiler cannot even be imported: models run as they were."""

    def optimize(model: Any, **options: Any) -> Any:
        if options.get("strict"):
            raise OptimizeError(reason)
        warnings.warn(f"the model runs as it was: {reason}", stacklevel=2)
        return model

    def explain(model: Any) -> Report:
        return Report((), (Bypass("", reason),))

    return {"optimize": optimize, "explain": explain, "restore": lambda model: model}
