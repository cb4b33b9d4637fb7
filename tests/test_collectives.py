"""What a compiled program sends, on eight simulated devices and from a TPU's text."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jrm_jax import sharding
from jrm_jax.planning.collectives import Traffic, read_collectives


def test_collectives_of_a_compiled_program():
    """Eight devices, a loop of three: a gather per turn, a sum and a permutation outside."""
    mesh = sharding.make_mesh(2, 4, 1)

    def program(x, kernels):
        def turn(x, kernel):
            whole = jax.lax.all_gather(kernel, "fsdp", tiled=True)
            return jnp.tanh(x @ whole), None

        x, _ = jax.lax.scan(turn, x, kernels)
        x = jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])
        return jax.lax.psum(x, "fsdp"), jax.lax.psum_scatter(x, "fsdp", tiled=True)

    mapped = jax.shard_map(
        program,
        mesh=mesh,
        in_specs=(P(("data", "fsdp")), P(None, "fsdp")),
        out_specs=(P("data"), P(("data", "fsdp"))),
        check_vma=False,
    )
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P()))
    kernels = jax.ShapeDtypeStruct((3, 32, 32), jnp.float32, sharding=NamedSharding(mesh, P()))
    text = jax.jit(mapped).lower(x, kernels).compile().as_text()
    found = read_collectives(text, 8)
    kernel, rows = 32 * 32 * 4, 8 * 32 * 4  # bytes
    assert found.network == {}
    assert found.links["all-gather"] == Traffic(3, 3 * kernel * 3 // 4)
    assert found.links["all-reduce"] == Traffic(1, 2 * rows * 3 // 4)
    assert found.links["reduce-scatter"] == Traffic(1, rows * 3 // 4)
    assert found.links["collective-permute"] == Traffic(1, rows)
    # the first four devices one slice, the others another: only the exchange crosses
    apart = read_collectives(text, 8, slices=2)
    assert set(apart.network) == {"collective-permute"}
    assert set(apart.links) == {"all-gather", "all-reduce", "reduce-scatter"}


TPU_TEXT = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %r = f32[] add(%a, %b)
}

%start (p: bf16[64,8]) -> bf16[512,8] {
  ROOT %g.1 = bf16[512,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=5, replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0'}, dimensions={0}
}

%done (p.2: bf16[64,8]) -> bf16[512,8] {
  ROOT %g.2 = bf16[512,8]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=5, replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0'}, dimensions={0}
}

%all-reduce-scatter.3 (p.3: f32[64,8]) -> f32[8,8] {
  %r.3 = f32[64,8]{1,0:T(8,128)} all-reduce(%p.3), channel_id=6, replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}, to_apply=%add
  ROOT %d.3 = f32[8,8]{1,0:T(8,128)} dynamic-slice(%r.3, %at), dynamic_slice_sizes={8,8}
}

%cond (c: (s32[], bf16[64,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %at = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

%body (b.1: (s32[], bf16[64,8])) -> (s32[], bf16[64,8]) {
  %f.1 = bf16[512,8]{1,0} fusion(%x), kind=kCustom, calls=%start
  %f.2 = bf16[512,8]{1,0} fusion(%x), kind=kCustom, calls=%done
  %f.3 = f32[8,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %t = (s32[], bf16[64,8]) tuple(%i, %x)
}

ENTRY %main (p0: bf16[64,8]) -> f32[4] {
  %w = (s32[]{:T(128)}, bf16[64,8]) while(%t0), condition=%cond, body=%body
  %s = (f32[4]{0:T(128)}, f32[2]{0:T(128)}) all-reduce(%y, %z), channel_id=9, replica_groups=[8,2]<=[2,8]T(1,0), to_apply=%add
  ROOT %o = f32[4] get-tuple-element(%s), index=0
}
"""  # noqa: E501

SEND = """
  %send.1 = (bf16[9,8]{1,0:T(8,128)(2,1)}, u32[], token[]) send(%x, %after), channel_id=40, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
"""  # noqa: E501


def test_collectives_of_a_tpu_program():
    """A gather spread over two fusions counts once, as often as the loop's condition says; a sum
    of which each device keeps its part is a scatter."""
    found = read_collectives(TPU_TEXT, 16, slices=2)
    # axis_0 strides over both slices, and so do pairs (i, i + 8)
    assert found.network["all-gather"] == Traffic(7, 7 * 512 * 8 * 2 * 7 // 8)
    assert found.network["all-reduce"] == Traffic(1, 2 * 24 // 2)
    assert found.links == {"reduce-scatter": Traffic(7, 7 * 64 * 8 * 4 * 7 // 8)}
    # a product that gathers piece by piece counts in unsigned numbers
    assert read_collectives(TPU_TEXT.replace("s32[]", "u32[]"), 16, slices=2) == found


def test_what_crosses_slices_is_handed_to_the_host():
    text = TPU_TEXT.replace("  %f.1 =", f"{SEND.rstrip()}\n  %f.1 =")
    found, before = (read_collectives(each, 16, slices=2) for each in (text, TPU_TEXT))
    assert found.links == before.links
    assert found.network["all-reduce"] == Traffic(1 + 7, 24 + 7 * 9 * 8 * 2)
    gathered = read_collectives(text.replace("ALL_REDUCE", "ALL_GATHER"), 16, slices=4)
    assert gathered.network["all-gather"].count == 7 + 7
    more = gathered.network["all-gather"].bytes - before.network["all-gather"].bytes
    assert more == 7 * 9 * 8 * 2 * 3
