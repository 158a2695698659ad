"""The questions of an audit. Docs, tables and tests take their lists from here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One question of an audit.

    Attributes:
        name: by which it is known in tables, JSON and docs, such as ``"gradient-scale"``.
        question: what a pass answers with yes.
        advice: what to do if the answer is no; one sentence, without a period.
    """

    name: str
    question: str
    advice: str


CHECKS: dict[str, Check] = {
    check.name: check
    for check in (
        # what is trained
        Check("trainable-set", "Is all trained that was meant to be, and nothing else?",
              "look at target_modules, target_parameters and modules_to_save, or at requires_grad"),
        Check("adapter-reach", "Does every layer that the adapter's targets name have an adapter "
              "that takes part in the forward?",
              "name the parameters of stacked experts in target_parameters"),
        # gradients, by themselves
        Check("gradient-missing", "Does every trainable tensor get a gradient?",
              "something cuts the graph: detach, no_grad, a reentrant checkpoint of inputs without "
              "gradients, or a module that is not called"),
        Check("gradient-zero", "Is every gradient different from zero where the plain model's is?",
              "compare the loss's backward with F.cross_entropy's; look at the mask of the labels"),
        Check("gradient-finite", "Is every gradient finite?",
              "lower the learning rate's scale or train in bf16 or fp32"),
        # gradients, against the plain model's
        Check("gradient-scale", "Has every gradient the size that the plain model's has?",
              "something is added twice, or divided by another number of tokens"),
        Check("gradient-sign", "Has every gradient the direction that the plain model's has?",
              "a backward pass has a wrong sign"),
        Check("gradient-rows", "Are the gradients right for every sample and position, not only "
              "for the first?", "a backward pass reads the first rows only"),
        Check("gradient-value", "Is every gradient as near to the plain model's as rounding lets "
              "it be?", "a patched layer's backward pass is wrong: train without that patch"),
        Check("gradient-drift", "Are the errors of the gradients free of a bias?",
              "a kernel rounds in one direction: train without that patch"),
        Check("experts-reached", "Does every expert that tokens are routed to get a gradient?",
              "the experts are frozen, or their gradients are dropped"),
        # the loss
        Check("loss-value", "Is the loss the cross entropy of the logits and labels?",
              "a fused loss is wrong, or another loss is computed"),
        Check("loss-scale", "Is the loss divided by the number of trained tokens?",
              "pass num_items_in_batch, or average over tokens instead of batches"),
        Check("accumulation-scale", "Are the gradients of accumulated batches those of one large "
              "batch?", "average over the tokens of all batches of a step"),
        # the rows
        Check("trained-tokens", "Are any tokens trained, and no padding or image placeholders?",
              "look at the labels of a row: fusewright preprocess --debug shows a recipe's"),
        Check("end-of-turn", "Is the token that ends an answer trained?",
              "train the end of turn (train_on_eos: turn), else the model does not stop"),
        Check("row-ends", "Are the first and the last token of the answers trained?",
              "the mask of the labels is shifted by one token"),
        Check("packing", "Are the samples of a pack independent of each other?",
              "give position_ids or cu_seqlens to every layer, or do not pack"),
        Check("recurrent-state", "Do recurrent layers and convolutions start anew at each sample?",
              "pad instead of packing, or give the layers seq_idx"),
        # what was asked for is in force
        Check("dropout", "Is the dropout that was asked for in force?",
              "call model.train(); a patched layer may leave dropout out"),
        Check("checkpointing", "Is gradient checkpointing on exactly if it was asked for?",
              "with a frozen base, call enable_input_require_grads or use use_reentrant=False"),
        Check("warmup", "Does the learning rate follow the schedule that was asked for?",
              "look at warmup_steps, warmup_ratio and at who steps the scheduler"),
        # weights
        Check("weights-moved", "Did the optimizer change every trained tensor, and no other?",
              "the optimizer was made before the adapter, or has other tensors, or its step was "
              "skipped"),
    )
}  # fmt: skip
