"""MFU against a hand count, and only where the peak is known."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from opera_jax import structs
from opera_jax.models import decoder, lora
from opera_jax.plan import cost, hardware, utilisation

CONFIG = decoder.Config(
  vocab_size=64,
  hidden_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=8,
  intermediate_size=48,
)


def _rows(segments, targets, shared=0):
  segments = np.asarray(segments, np.int32)
  mask = np.isin(segments, targets).astype(np.float32)
  return structs.Batch(
    *(segments,) * 3,
    *(mask,) * 4,
    prefix_length=shared,
    num_continuations=2 if shared else 0,
  )


def _count(tokens, targets, pairs):
  """6 N a token and 12 L H D a pair: three times the forward pass."""
  matrices = 32 * 8 * (2 * 4 + 2 * 2) + 3 * 32 * 48
  return 6.0 * (
    2 * matrices * tokens + 32 * 64 * targets + 2 * 2 * 4 * 8 * pairs
  )


def test_flops_are_of_real_tokens_and_the_pairs_that_see_each_other():
  plain = _rows([[1, 1, 1, 2, 2, 0, 0, 0], [1] * 4 + [0] * 4], [2])
  assert cost.rows_flops(CONFIG, plain) == _count(9, 2, 6 + 3 + 10)
  # A prompt of 3 with completions of 2 and 1, which see it and themselves.
  shared = _rows([[1, 1, 1, 0, 2, 2, 3, 0]], [2, 3], shared=4)
  assert cost.rows_flops(CONFIG, shared) == _count(6, 3, 6 + (6 + 3) + (3 + 1))
  # As the plan counts a whole row.
  whole = cost.update(CONFIG, 2, 8)
  full = _rows([[1] * 8] * 2, [1])
  assert cost.rows_flops(CONFIG, full) == whole.forward + whole.backward
  adapted = dataclasses.replace(
    CONFIG, lora=lora.Settings(rank=2, targets=("q",))
  )
  whole = cost.update(adapted, 2, 8)
  assert cost.rows_flops(adapted, full) == whole.forward + whole.backward


@pytest.mark.parametrize(
  ("kind", "peak"),
  [
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v5p", 459e12),
    ("TPU7x", 2_307e12 / 2),
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", None),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA L40S", None),
    ("TPU v4", None),
    ("cpu", None),
  ],
)
def test_peaks_are_those_of_the_device_or_none(kind, peak):
  assert hardware.peak_flops(kind) == peak


def test_mfu_is_flops_over_time_and_peak(monkeypatch):
  rows = _rows([[1] * 8] * 2, [1])
  assert utilisation.metrics(CONFIG, rows, passes=2, seconds=4.0) == {}
  device = types.SimpleNamespace(
    device_kind="TPU v5 lite",
    memory_stats=lambda: {"peak_bytes_in_use": 3 << 30},
  )
  monkeypatch.setattr(jax, "devices", lambda: [device] * 4)
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  got = utilisation.metrics(CONFIG, rows, passes=2, seconds=4.0)
  want = 2 * _count(16, 16, 2 * 36) / (4.0 * 4 * 197e12)
  assert got == {
    "perf/mfu_update": pytest.approx(want),
    "perf/memory_peak_gib": 3.0,
  }
