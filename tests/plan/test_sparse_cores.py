"""Collectives that a TPU's SparseCores do beside its products."""

from jaxalign.plan.account import account

ON_A_SPARSE_CORE = """HloModule step, num_partitions=8
%scatter (p: bf16[64,128]) -> bf16[8,128] {
  %p = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %rs = bf16[8,128]{1,0:T(8,128)(2,1)} reduce-scatter(%p), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%sum, backend_config={"device_type":"DEVICE_TYPE_SPARSECORE","color_strategies":[{"phase_rings":[{"ring_type":"CW"}]},{"phase_rings":[{"ring_type":"CCW"}]}]}
}, execution_thread="sparsecore"

ENTRY %main (g: bf16[64,128], x: bf16[32,64], y: bf16[64,128]) -> (bf16[8,128], bf16[32,128]) {
  %g = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %x = bf16[32,64]{1,0:T(8,128)(2,1)} parameter(1)
  %y = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(2)
  %ready = token[] custom-call(), custom_call_target="PrepareAsyncCallDone"
  %rs-start = ((bf16[64,128]{1,0:T(8,128)(2,1)}, token[]), bf16[8,128]{1,0:T(8,128)(2,1)}) call-start(%g, %ready), async_execution_thread="sparsecore", to_apply=%scatter
  %product = bf16[32,128]{1,0:T(8,128)(2,1)} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %rs-done = bf16[8,128]{1,0:T(8,128)(2,1)} call-done(%rs-start)
  ROOT %out = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}) tuple(%rs-done, %product)
}
"""  # noqa: E501


def test_a_sparse_core_scatters_beside_products():
    found = account(ON_A_SPARSE_CORE)
    [scatter] = found.collectives
    assert (scatter.kind, scatter.bytes, scatter.asynchronous) == ("reduce-scatter", 2 * 64 * 128, True)
    assert scatter.between_flops == found.flops == 2 * 32 * 64 * 128
    assert scatter.rings == 2
