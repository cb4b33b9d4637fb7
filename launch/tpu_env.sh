# shellcheck shell=bash
# Environment of a training process: source launch/tpu_env.sh GENERATION [SLICES] [--dry-run]
# GENERATION is v5e, v5p, v6e or tpu7x. None of the flags was measured here: they are what public
# recipes for these chips use. JRM_XLA_FLAGS=off leaves all of them out, to compare.

_jrm_flags=()
_jrm_add() { _jrm_flags+=("$@"); }

# FSDP gathers a layer's parameters while the layer before computes
_jrm_overlap() {
  _jrm_add --xla_tpu_enable_async_collective_fusion=true              # gathers become asynchronous
  _jrm_add --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true # FSDP's collective is this one
  _jrm_add --xla_tpu_enable_async_collective_fusion_multiple_steps=true # hidden behind several products
  _jrm_add --xla_tpu_overlap_compute_collective_tc=true               # products and transfers side by side
  _jrm_add --xla_enable_async_all_gather=true                         # starts a gather before it is needed
}

case "${1:-}" in
  v5e)
    _jrm_overlap
    ;;
  v5p)
    _jrm_overlap
    _jrm_add --xla_tpu_megacore_fusion_allow_ags=false       # gathers fused over both cores block them
    _jrm_add --xla_enable_async_collective_permute=true      # the torus' neighbours, in the background
    _jrm_add --xla_tpu_enable_ag_backward_pipelining=true    # the backward pass gathers one layer ahead
    ;;
  v6e)
    _jrm_overlap
    _jrm_add --xla_tpu_scoped_vmem_limit_kib=98304           # larger tiles: v6e has 128 MiB of vector memory
    _jrm_add --xla_tpu_use_minor_sharding_for_major_trivial_input=true # fewer relayouts around gathers
    _jrm_add --xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1 # gradients scatter without a copy
    _jrm_add --xla_tpu_assign_all_reduce_scatter_layout=true # the layout that the scatter wants, from the start
    ;;
  tpu7x) ;; # its sparse cores do collectives by default, and the fusions above exclude that
  *)
    echo "error: source launch/tpu_env.sh v5e|v5p|v6e|tpu7x [SLICES]" >&2
    # shellcheck disable=SC2317  # reached where this file is run and not sourced
    return 1 2>/dev/null || exit 1
    ;;
esac

if [[ "${2:-1}" =~ ^[0-9]+$ ]] && ((${2:-1} > 1)); then
  _jrm_add --xla_tpu_enable_data_parallel_all_reduce_opt=true # gradients cross slices while others compute
  _jrm_add --xla_tpu_data_parallel_opt_different_sized_ops=true # they differ in size
  _jrm_add --megascale_abort_on_hangs=true # a silent hang becomes an exit that a controller sees
fi

[[ "${JRM_XLA_FLAGS:-on}" == on ]] || _jrm_flags=()
export LIBTPU_INIT_ARGS="${_jrm_flags[*]}"
export JAX_PLATFORMS=tpu,cpu # fail where no TPU is found, and keep the CPU for host work
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-/jrm/compiled}" # local: buckets can hang
export HF_HUB_OFFLINE=1 # tokenizer and weights are in a folder
ulimit -n 65536 2>/dev/null || true # data shards, checkpoint chunks and sockets

for _jrm_argument in "$@"; do
  if [[ "$_jrm_argument" == --dry-run ]]; then
    for _jrm_name in LIBTPU_INIT_ARGS JAX_PLATFORMS JAX_COMPILATION_CACHE_DIR HF_HUB_OFFLINE; do
      printf 'export %s=%q\n' "$_jrm_name" "${!_jrm_name}"
    done
  fi
done
unset -f _jrm_add _jrm_overlap
unset _jrm_flags _jrm_argument _jrm_name
