"""Names of the events that the executor logs."""

from typing import Final

MODEL_LOADING: Final = "model_loading"
NUMA_NODE_CHOSEN: Final = "numa_node_chosen"
CPU_STEP_CHOSEN: Final = "cpu_step_chosen"
MODEL_LOADED: Final = "model_loaded"
SAMPLING_DEFAULTS: Final = "sampling_defaults"
MEMORY_BUDGETED: Final = "memory_budgeted"
POOL_REGISTERED: Final = "pool_registered"
MEMSVC_UNREACHABLE: Final = "memsvc_unreachable"
EPOCH_BEGUN: Final = "epoch_begun"
GATEWAY_CONNECTED: Final = "gateway_connected"
GATEWAY_DISCONNECTED: Final = "gateway_disconnected"
GATEWAY_FENCED: Final = "gateway_fenced"
EXECUTOR_REPLACED: Final = "executor_replaced"
BATCH_INVARIANCE_MEASURED: Final = "batch_invariance_measured"
SWAP_MEASURED: Final = "swap_measured"
KV_CACHE_SHRUNK: Final = "kv_cache_shrunk"
KV_SCALES_CHOSEN: Final = "kv_scales_chosen"
GRAPHS_CAPTURED: Final = "graphs_captured"
DEVICE_FAILED: Final = "device_failed"
SERVICE_FAILED: Final = "service_failed"
CONFIG_LOADED: Final = "config_loaded"

ALL: Final = frozenset(value for name, value in dict(globals()).items() if name.isupper())
