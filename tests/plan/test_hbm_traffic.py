"""Bytes through HBM of programs whose traffic is known by hand."""

import pytest

from opera_jax.plan import hbm_traffic, hlo

MB = 1 << 20


def _count(body, computations="", **given):
  text = f"""HloModule m
{computations}
ENTRY %main (x: f32[1024,256]) -> f32[1024,256] {{
  %x = f32[1024,256] parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,256] parameter(2)
{body}
}}
"""
  return hbm_traffic.count(text, **given)


@pytest.mark.parametrize(
  ("body", "moved"),
  [
    # The array is 1 MiB, a row 1 KiB.
    ("  ROOT %y = f32[1024,256] add(%x, %x)", 3 * MB),
    ("  ROOT %y = f32[256,1024] transpose(%x), dimensions={1,0}", 2 * MB),
    ("  ROOT %y = f32[1,1024,256] bitcast(%x)", 0),
    ("  ROOT %y = f32[8,256] slice(%x), slice={[0:8], [0:256]}", 2 * 8192),
    ("  ROOT %y = f32[1,256] dynamic-slice(%x, %i, %i)", 2 * 1024 + 8),
    # In place: the row alone.
    (
      "  ROOT %y = f32[1024,256] dynamic-update-slice(%x, %row, %i, %i)",
      2 * 1024,
    ),
    ("  ROOT %y = f32[1024,256] scatter(%x, %i, %row), to_apply=%a", 2 * 1024),
    # What lies in VMEM, S(1), costs nothing, whichever side it is.
    ("  ROOT %y = f32[1024,256]{1,0:T(8,128)S(1)} negate(%x)", MB),
    (
      "  %s = (f32[1024,256]{1,0:S(1)}, f32[1024,256]{1,0}, u32[]{:S(2)}) "
      "copy-start(%x)\n"
      "  %d = f32[1024,256]{1,0:S(1)} copy-done(%s)\n"
      "  ROOT %y = f32[1024,256] negate(%d)",
      2 * MB,
    ),
    # Tiles: 3 rows take 8, and 100 columns 128.
    (
      "  %q = f32[3,100]{1,0:T(8,128)} parameter(3)\n"
      "  ROOT %y = f32[3,100]{1,0:T(8,128)S(1)} negate(%q)",
      8 * 128 * 4,
    ),
    # A column-major one: 100 rows take 128, and 3 columns 8.
    (
      "  %q = f32[100,3]{0,1:T(8,128)} parameter(3)\n"
      "  ROOT %y = f32[100,3]{0,1:S(1)} negate(%q)",
      8 * 128 * 4,
    ),
    # A collective that is started counts at its start.
    (
      "  %s = (f32[1024,256], f32[2048,256]) all-gather-start(%x)\n"
      "  ROOT %y = f32[2048,256] all-gather-done(%s)",
      3 * MB,
    ),
    (
      "  ROOT %y = f32[1024,256] custom-call(), "
      'custom_call_target="AllocateBuffer"',
      0,
    ),
  ],
)
def test_each_instruction_moves_what_it_touches(body, moved):
  assert _count(body) == hbm_traffic.Moved(moved, ())


FUSED = """
%inner (p: f32[1024,256]) -> f32[256,1024] {
  %p = f32[1024,256] parameter(0)
  ROOT %t = f32[256,1024] transpose(%p), dimensions={1,0}
}

%sliced (p: f32[1024,256], i: s32[]) -> f32[1,256] {
  %p = f32[1024,256] parameter(0)
  %i = s32[] parameter(1)
  %b = f32[1024,256] bitcast(%p)
  %d = f32[1,256] dynamic-slice(%b, %i, %i)
  ROOT %n = f32[1,256] negate(%d)
}

%nested (p: f32[1024,256], i: s32[]) -> f32[4,1] {
  %p = f32[1024,256] parameter(0)
  %i = s32[] parameter(1)
  %t = f32[256,1024] fusion(%p), kind=kLoop, calls=%inner
  %d = f32[4,1] dynamic-slice(%t, %i, %i)
  ROOT %n = f32[4,1] negate(%d)
}

%updated (p: f32[1024,256], r: f32[1,256], i: s32[]) -> f32[1024,256] {
  %p = f32[1024,256] parameter(0)
  %r = f32[1,256] parameter(1)
  %i = s32[] parameter(2)
  ROOT %u = f32[1024,256] dynamic-update-slice(%p, %r, %i, %i)
}

%both (p: f32[1024,256], r: f32[1,256], i: s32[]) -> (f32[1024,256], f32[1]) {
  %p = f32[1024,256] parameter(0)
  %r = f32[1,256] parameter(1)
  %i = s32[] parameter(2)
  %n = f32[1024,256] negate(%p)
  %u = f32[1024,256] dynamic-update-slice(%n, %r, %i, %i)
  %s = f32[1] slice(%r), slice={[0:1], [0:1]}
  ROOT %o = (f32[1024,256], f32[1]) tuple(%u, %s)
}
"""


@pytest.mark.parametrize(
  ("body", "moved"),
  [
    # One row of the operand, the index, one row out.
    (
      "  ROOT %y = f32[1,256] fusion(%x, %i), kind=kLoop, calls=%sliced",
      2 * 1024 + 4,
    ),
    # Through a fusion inside, too.
    (
      "  ROOT %y = f32[4,1] fusion(%x, %i), kind=kLoop, calls=%nested",
      2 * 16 + 4,
    ),
    (
      "  ROOT %y = f32[1024,256] fusion(%x, %row, %i), calls=%updated",
      2 * 1024 + 4,
    ),
    # Not in place: the whole array is read, changed and written.
    (
      "  ROOT %y = (f32[1024,256], f32[1]) fusion(%x, %row, %i), calls=%both",
      2 * MB + 1024 + 4 + 4,
    ),
    # A slice that starts early: the slice alone, once.
    (
      "  %s = ((f32[1024,256], s32[]), f32[1,256], u32[]) "
      "async-start(%x, %i), calls=%sliced\n"
      "  ROOT %y = f32[1,256] async-done(%s)",
      2 * 1024 + 4,
    ),
  ],
)
def test_a_fusion_counts_what_it_touches(body, moved):
  assert _count(body, FUSED).bytes == moved


def test_a_loop_moves_its_body_every_time():
  loop = """
%body (p: (f32[1024,256], s32[])) -> (f32[1024,256], s32[]) {
  %p = (f32[1024,256], s32[]) parameter(0)
  %x = f32[1024,256] get-tuple-element(%p), index=0
  %i = s32[]{:S(6)} get-tuple-element(%p), index=1
  %one = s32[]{:S(6)} constant(1)
  %next = s32[]{:S(6)} add(%i, %one)
  %c = f32[1024,256] copy(%x)
  ROOT %o = (f32[1024,256], s32[]) tuple(%c, %next)
}

%cond (p: (f32[1024,256], s32[])) -> pred[] {
  %p = (f32[1024,256], s32[]) parameter(0)
  %i = s32[]{:S(6)} get-tuple-element(%p), index=1
  %n = s32[]{:S(6)} constant(5)
  ROOT %lt = pred[]{:S(6)} compare(%i, %n), direction=LT
}
"""
  moved = _count(
    "  %t = (f32[1024,256], s32[]) tuple(%x, %zero)\n"
    "  ROOT %w = (f32[1024,256], s32[]) while(%t), condition=%cond, body=%body",
    loop,
  )
  assert moved.bytes == 5 * 2 * MB


KERNEL = (
  "  ROOT %attend.3 = f32[256] custom-call(%x, %row), "
  'custom_call_target="tpu_custom_call", '
  'metadata={op_name="jit(f)/attention/attend/pallas_call"}'
)


def test_a_kernel_reads_the_share_that_the_plan_states():
  def reads(kernel, dims):
    assert kernel == "attend"
    return {(1024, 256): 0.25, (1, 256): 1.0}[dims]

  moved = _count(KERNEL, reads=reads)
  assert moved == hbm_traffic.Moved(MB / 4 + 1024 + 1024, ())


def test_an_unknown_kernel_reads_its_operands_once_and_is_named():
  moved = _count(KERNEL)
  assert moved == hbm_traffic.Moved(MB + 1024 + 1024, ("attend",))


def test_parsing_keeps_names_types_and_operands():
  module = hlo.Module(
    "ENTRY %main (x: f32[8]) -> f32[8] {\n"
    "  %p.1 = (f32[8]{0:T(8)}, /*index=1*/s32[]) parameter(0)\n"
    '  ROOT %c = f32[8] custom-call(%p.1, %p.1), custom_call_target="t("\n'
    "}\n"
  )
  [parameter, call] = module.computations["main"].values()
  assert parameter.type_text == "(f32[8]{0:T(8)}, /*index=1*/s32[])"
  assert [a.dims for a in parameter.arrays] == [(8,), ()]
  assert call.operands == ["p.1", "p.1"] and module.root("main") == call
