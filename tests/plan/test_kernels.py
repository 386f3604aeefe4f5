"""What one kernel reads and writes."""

from jaxalign.plan.account import account


def test_a_slice_in_a_fusion_within_a_fusion():
    """As a TPU's compiler writes it: of a stack of layers' arrays one is read."""
    text = """HloModule m, num_partitions=1

%cut (a: f32[8,32], i: s32[]) -> f32[1,32] {
  %a = f32[8,32]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,32]{1,0} dynamic-slice(%a, %i, %zero), dynamic_slice_sizes={1,32}
}

%twice (b: f32[8,32], j: s32[]) -> f32[1,32] {
  %b = f32[8,32]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %own = f32[1,32]{1,0} fusion(%b, %j), kind=kLoop, calls=%cut
  ROOT %sum = f32[1,32]{1,0} add(%own, %own)
}

ENTRY %main (stack: f32[8,32], at: s32[]) -> f32[1,32] {
  %stack = f32[8,32]{1,0} parameter(0)
  %at = s32[] parameter(1)
  ROOT %done = f32[1,32]{1,0} fusion(%stack, %at), kind=kLoop, calls=%twice
}
"""
    assert account(text).traffic_bytes == 2 * 4 * 32 + 4  # read, written, and where it lies
