"""The contract between Quire and an accelerator: all that a backend imports.

Importing it imports neither torch nor any vendor's SDK.
"""

from __future__ import annotations

from quire.core.interface.attention import (
    AttentionBackend,
    AttentionBatch,
    AttentionPlan,
    AttentionSpec,
    CacheLayout,
    CacheTensor,
    LayerCache,
)
from quire.core.interface.backend import Backend, Device, DeviceInfo, MemoryInfo, Probe
from quire.core.interface.capabilities import Capabilities
from quire.core.interface.communicator import Communicator, SoloCommunicator
from quire.core.interface.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    DeviceLost,
    DeviceOutOfMemory,
    EngineDeadError,
    PluginError,
    QuireError,
    Reason,
    RequestError,
    UnsupportedError,
)
from quire.core.interface.experts import (
    ExpertWeights,
    PackedExperts,
    QuantizedExperts,
    RoutingSpec,
)
from quire.core.interface.fusion import (
    DecoderLayerParts,
    DeltaMixerParts,
    FusedLayer,
    FusedLayers,
    FusedMixer,
    MixerParts,
    MixtureLayerParts,
    StatePieces,
)
from quire.core.interface.graphs import CapturedStep, GraphCapture
from quire.core.interface.op_specs import OP_SPECS, OpSpec
from quire.core.interface.ops import (
    Ops,
    PackedLinear,
    SampledLogprobs,
    SamplingTensors,
)
from quire.core.interface.quantization import QuantizedWeight
from quire.core.interface.queue import Event, ImmediateQueue, Queue
from quire.core.interface.recurrence import Sequences, StateSlots, StateSpec
from quire.core.interface.version import INTERFACE_VERSION, check_interface_version
from quire.core.interface.worker import (
    NULL_BLOCK,
    CacheGroup,
    CachePlan,
    CompletedStep,
    Feature,
    FeatureArray,
    ModelInfo,
    NewRequest,
    PendingStep,
    PooledNumbers,
    PoolingSpec,
    PositionLogprobs,
    SamplingSpec,
    StepBatch,
    StepResult,
    Worker,
    WorkerConfig,
)

__all__ = [
    "INTERFACE_VERSION",
    "NULL_BLOCK",
    "OP_SPECS",
    "AttentionBackend",
    "AttentionBatch",
    "AttentionPlan",
    "AttentionSpec",
    "Backend",
    "CacheGroup",
    "CacheLayout",
    "CachePlan",
    "CacheTensor",
    "Capabilities",
    "CapturedStep",
    "CheckpointError",
    "Communicator",
    "CompletedStep",
    "ConfigError",
    "DecoderLayerParts",
    "DeltaMixerParts",
    "Device",
    "DeviceError",
    "DeviceInfo",
    "DeviceLost",
    "DeviceOutOfMemory",
    "EngineDeadError",
    "Event",
    "ExpertWeights",
    "Feature",
    "FeatureArray",
    "FusedLayer",
    "FusedLayers",
    "FusedMixer",
    "GraphCapture",
    "ImmediateQueue",
    "LayerCache",
    "MemoryInfo",
    "MixerParts",
    "MixtureLayerParts",
    "ModelInfo",
    "NewRequest",
    "OpSpec",
    "Ops",
    "PackedExperts",
    "PackedLinear",
    "PendingStep",
    "PluginError",
    "PooledNumbers",
    "PoolingSpec",
    "PositionLogprobs",
    "Probe",
    "QuantizedExperts",
    "QuantizedWeight",
    "Queue",
    "QuireError",
    "Reason",
    "RequestError",
    "RoutingSpec",
    "SampledLogprobs",
    "SamplingSpec",
    "SamplingTensors",
    "Sequences",
    "SoloCommunicator",
    "StatePieces",
    "StateSlots",
    "StateSpec",
    "StepBatch",
    "StepResult",
    "UnsupportedError",
    "Worker",
    "WorkerConfig",
    "check_interface_version",
]
