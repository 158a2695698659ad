"""The features of the compiler, in the order in which they open and close a unit.

A feature is one file in this folder and one name in the tuple below. ``docs/architecture.md`` shows
how to add one.
"""

from .autograd_functions import AutogradFunctions
from .cleanup import Cleanup
from .deferred_logits import DeferredLogits
from .input_gradients import InputGradients
from .output_inputs import OutputInputs
from .packed_samples import PackedSamples
from .packed_stacks import PackedStacks
from .saved_copies import SavedCopies
from .strict import Strict
from .subclasses import Subclasses
from .writes import Writes

FEATURES = (
    AutogradFunctions,  # first: it removes what Dynamo has added, before effects are read
    InputGradients,  # while checkpoints and writes are as in the code
    Writes,  # before the rules, which leave writes alone
    PackedSamples,
    Cleanup,  # after writes are values, some of which nothing uses
    OutputInputs,  # before the rules, whose ops hide what an output depends on
    Subclasses,
    PackedStacks,
    DeferredLogits,  # closed after the rules: logits are deferred where a loss was fused
    SavedCopies,  # closed when all ops are there, which say what they keep
    Strict,  # after all that may leave a formula as it was
)
