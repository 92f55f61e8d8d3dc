"""How well a step uses its devices: MFU of the updates, and memory."""

import jax

from opera_jax import structs
from opera_jax.models import decoder
from opera_jax.plan import cost, hardware

_GIB = 1 << 30
_PEAK = "peak_bytes_in_use"


def metrics(
  config: decoder.Config, rows: structs.Batch, *, passes: int, seconds: float
) -> dict[str, float]:
  """MFU of a step's updates, and the peak of device memory.

  MFU (PaLM, arXiv 2204.02311) is the FLOPs of forward and backward passes over
  real tokens, without padding and recomputation, over what the devices could
  do at their stated bf16 peak in that time. A shared prompt counts once.

  Args:
    config: of the model.
    rows: packed rows of the step, on the host.
    passes: over the rows.
    seconds: that the updates took.

  Returns:
    "perf/mfu_update" where the peak of the device is known, and
    "perf/memory_peak_gib", the largest of this process's devices since the
    start, where devices report it.
  """
  out = {}
  devices = jax.devices()
  peak = hardware.peak_flops(devices[0].device_kind)
  if peak is not None:
    flops = passes * cost.rows_flops(config, rows)
    out["perf/mfu_update"] = flops / (seconds * peak * len(devices))
  stats = [device.memory_stats() for device in jax.local_devices()]
  peaks = [s[_PEAK] for s in stats if s and _PEAK in s]
  if peaks:
    out["perf/memory_peak_gib"] = max(peaks) / _GIB
  return out
