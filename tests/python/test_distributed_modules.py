"""Tensor-parallel modules and ring attention, each in two processes."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from two_processes import run_in_two_processes

import torch_selfattn as ts

DTYPE = torch.float64


def make(*shape):
    return torch.randn(*shape, dtype=DTYPE)


# ---- Tensor parallel -----------------------------------------------------------------------------

D, H, B, LQ, LK = 16, 4, 2, 5, 7

MODULES = {
    "plain": {},
    "additive, grouped": dict(score="additive", num_kv_heads=2),
    "length first": dict(batch_first=False),
    "no bias, window": dict(bias=False, window=(2, 1)),
    "rotary": dict(rotary=True, num_kv_heads=2),
    "alibi": dict(alibi=True),
    "appended keys": dict(add_bias_kv=True, add_zero_attn=True),
    "three projections": dict(kdim=6, vdim=10, score="additive"),
}


def module_of(options):
    options = {"batch_first": True, "dtype": DTYPE} | options
    if options.get("rotary"):
        options["rotary"] = ts.nn.RotaryEmbedding(4, 16).to(DTYPE)
    module = ts.nn.MultiHeadAttention(D, H, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(make(*parameter.shape) / 2)
    return module


def inputs_of(module, same):
    query = make(B, LQ, D)
    given = [query, query, query] if same else [query, make(B, LK, module.kdim)]
    if not same:
        given.append(given[1] if module.kdim == module.vdim else make(B, LK, module.vdim))
    if not module.batch_first:
        given = [x.transpose(0, 1) for x in given]
    return given


def masks_of(kind, length):
    if kind == "padding":
        mask = torch.zeros(B, length, dtype=torch.bool)
        mask[0, -2:] = True
        return {"key_padding_mask": mask}
    if kind == "mask of heads":
        return {"attn_mask": make(B * H, LQ, length)}
    if kind == "mask and lengths":
        return {"attn_mask": make(LQ, length), "key_lengths": torch.tensor([length, 3])}
    return {"is_causal": True}


def whole_gradient(module, name, parameter):
    from torch.distributed.tensor import DTensor

    grad = parameter.grad
    grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
    owner = module.get_submodule(name.rpartition(".")[0])
    if name.rpartition(".")[2] in ("in_proj_weight", "in_proj_bias"):
        return grad[torch.argsort(owner._row_order)]
    return grad


def compare_gradients(divided, alone):
    for (name, a), (_, b) in zip(divided.named_parameters(), alone.named_parameters(), strict=True):
        torch.testing.assert_close(
            whole_gradient(divided, name, a), b.grad, msg=lambda m, n=name: f"{n}: {m}"
        )


def run_module(module, inputs, masks, **options):
    leaves = {id(x): x.clone().requires_grad_() for x in inputs}
    given = [leaves[id(x)] for x in inputs]
    masks = {
        name: x.clone().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in masks.items()
    }
    output, weights = module(*given, **masks, **options)
    leaves = [*leaves.values(), *(x for x in masks.values() if getattr(x, "requires_grad", False))]
    loss = output.sin().sum() if weights is None else output.sin().sum() + weights.cos().sum()
    module.zero_grad()
    loss.backward()
    results = [output] if weights is None else [output, weights]
    return [*results, *(x.grad for x in leaves)]


def check_module(mesh, options):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import parallelize_module

    from torch_selfattn.distributed import MultiHeadAttentionParallel

    alone = module_of(options)
    divided = parallelize_module(copy.deepcopy(alone), mesh, MultiHeadAttentionParallel())
    for name, parameter in divided.named_parameters():
        if name != "out_proj.bias":
            assert parameter.to_local().numel() == parameter.numel() // 2, name
    packed = alone.kdim == alone.vdim == D
    for kind in ("causal", "padding", "mask of heads", "mask and lengths"):
        for same in (True, False) if packed else (False,):
            inputs = inputs_of(alone, same)
            masks = masks_of(kind, LQ if same else LK)
            for more in (
                {"need_weights": False},
                {"need_weights": True},
                {"need_weights": True, "average_attn_weights": False},
            ):
                want = run_module(alone, inputs, masks, **more)
                got = run_module(divided, inputs, masks, **more)
                for a, b in zip(got, want, strict=True):
                    torch.testing.assert_close(a, b)
                compare_gradients(divided, alone)
    unbatched = [x[0] if alone.batch_first else x[:, 0] for x in inputs_of(alone, False)]
    a, b = divided(*unbatched)[0], alone(*unbatched)[0]
    torch.testing.assert_close(a, b)

    # State dicts are those of the undivided module, in both directions.
    state, want = divided.state_dict(), alone.state_dict()
    assert list(state) == list(want)
    for name, x in state.items():
        assert isinstance(x, DTensor)
        torch.testing.assert_close(x.full_tensor(), want[name])
    state = {name: x.clone() for name, x in state.items()}  # not the parameters themselves
    other = module_of(options)
    want = other(*unbatched)[0]
    as_divided = parallelize_module(copy.deepcopy(other), mesh, MultiHeadAttentionParallel())
    for load in (
        lambda: divided.load_state_dict(as_divided.state_dict()),
        lambda: set_model_state_dict(
            divided, other.state_dict(), options=StateDictOptions(full_state_dict=True)
        ),
    ):
        divided.load_state_dict(state)
        torch.testing.assert_close(divided(*unbatched)[0], b)
        load()
        torch.testing.assert_close(divided(*unbatched)[0], want)


def check_layouts(mesh):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import parallelize_module

    from torch_selfattn.distributed import MultiHeadAttentionParallel

    for options in ({}, {"batch_first": False}, {"rotary": True}):
        alone = module_of(options)
        length = 0 if options.get("batch_first") is False else 1
        x = make(4, 4, D)
        want, _ = alone(x, x, x, need_weights=False)
        style = MultiHeadAttentionParallel(
            input_layouts=Shard(length), output_layouts=Shard(length), use_local_output=False
        )
        divided = parallelize_module(copy.deepcopy(alone), mesh, style)
        piece = distribute_tensor(x, mesh, [Shard(length)])
        for given in (piece, piece.to_local(), distribute_tensor(x, mesh, [Replicate()])):
            if given.shape != piece.shape:
                given = given.clone()
            got, _ = divided(given, given, given, need_weights=False)
            assert got.placements == (Shard(length),)
            torch.testing.assert_close(got.full_tensor(), want)
        alone.zero_grad()
        want.sin().sum().backward()
        got.sin().sum().backward()
        compare_gradients(divided, alone)
        with pytest.raises(RuntimeError, match="output_layouts must be Replicate"):
            divided(x[0], x[0], x[0])


def check_transformer(mesh):
    """Training a whole encoder, and decoding."""
    from torch.distributed.tensor.parallel import parallelize_module

    from torch_selfattn.distributed import tensor_parallel_plan

    layer = ts.nn.TransformerEncoderLayer(
        D, H, 24, dropout=0.0, batch_first=True, score="additive", num_kv_heads=2, dtype=DTYPE
    )
    alone = ts.nn.TransformerEncoder(layer, 2)
    divided = copy.deepcopy(alone)
    parallelize_module(divided, mesh, tensor_parallel_plan(divided))
    assert divided.layers[1].linear1.weight.to_local().shape == (12, D)
    x, target = make(2, B, LQ, D)
    losses = {}
    for name, model in (("alone", alone), ("divided", divided)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        losses[name] = []
        for _ in range(4):
            loss = (model(x, is_causal=True) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.detach())
    torch.testing.assert_close(losses["divided"], losses["alone"])
    assert losses["alone"][-1] < 0.9 * losses["alone"][0]

    layer = ts.nn.TransformerDecoderLayer(
        D, H, 24, dropout=0.0, batch_first=True, num_kv_heads=2, dtype=DTYPE
    )
    divided = copy.deepcopy(layer)
    parallelize_module(divided, mesh, tensor_parallel_plan(divided))
    memory = make(B, LK, D)
    with torch.no_grad():
        caches = [m.new_cache(memory, 4) for m in (layer, divided)]
        assert caches[1].key.shape[1] == 1 and caches[0].key.shape[1] == 2
        lengths = torch.zeros(B, dtype=torch.int64)
        for step in range(3):
            x = make(B, 1, D)
            want, got = (
                m.decode(x, cache, lengths + step)
                for m, cache in zip((layer, divided), caches, strict=True)
            )
            torch.testing.assert_close(got, want)


def check_parallel_dropout(mesh):
    """The same output everywhere, other numbers for other heads, one generator state after it."""
    from torch.distributed.tensor.parallel import parallelize_module

    from torch_selfattn.distributed import MultiHeadAttentionParallel

    for rotary in (None, ts.nn.RotaryEmbedding(8, 16)):  # the fused way and the other
        module = ts.nn.MultiHeadAttention(16, 2, 0.5, batch_first=True, bias=False, rotary=rotary)
        with torch.no_grad():
            # Two equal heads, the second subtracted from the first.
            for rows in module.in_proj_weight.view(3, 2, 8, 16):
                rows[1].copy_(rows[0])
            module.out_proj.weight.copy_(torch.cat([torch.eye(8), -torch.eye(8)], 1).repeat(2, 1))
        x = torch.randn(2, 6, 16)
        assert module.eval()(x, x, x, need_weights=False)[0].abs().max() < 1e-6
        divided = parallelize_module(module.train(), mesh, MultiHeadAttentionParallel())
        torch.manual_seed(5)
        output, _ = divided(x, x, x, need_weights=False)
        assert output.abs().max() > 0.1
        state = torch.get_rng_state()
        for mine in (output.detach(), state):
            other = mine.clone()
            dist.broadcast(other, 0)
            assert torch.equal(mine, other)
        torch.manual_seed(5)
        assert torch.equal(divided(x, x, x, need_weights=False)[0], output)
        assert not torch.equal(divided(x, x, x, need_weights=False)[0], output)


def check_refusals(mesh):
    from torch.distributed.tensor.parallel import parallelize_module

    from torch_selfattn.distributed import MultiHeadAttentionParallel, tensor_parallel_plan

    style = MultiHeadAttentionParallel()
    for module in (ts.nn.MultiHeadAttention(9, 3), ts.nn.MultiHeadAttention(8, 4, num_kv_heads=1)):
        with pytest.raises(ValueError, match="must be divisible by the number of processes"):
            parallelize_module(module, mesh, style)
    module = parallelize_module(ts.nn.MultiHeadAttention(8, 2), mesh, style)
    for wrong in (nn.Linear(2, 2), nn.MultiheadAttention(8, 2), module):
        with pytest.raises(NotImplementedError, match="must be an undivided"):
            parallelize_module(wrong, mesh, style)
    with pytest.raises(RuntimeError, match="before parallelize_module"):
        module.reset_parameters()
    x = torch.zeros(3, 1, 8)
    with pytest.raises(RuntimeError, match=r"attn_mask of 3 dimensions.*num_heads=2"):
        module(x, x, x, attn_mask=torch.zeros(1, 3, 3))
    with pytest.raises(ValueError, match="must contain modules"):
        tensor_parallel_plan(ts.nn.MultiHeadAttention(8, 2))


def check_modules(mesh):
    for name, options in MODULES.items():
        print(name)  # shown if it fails
        check_module(mesh, options)


def tensor_parallel(rank):
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    check_modules(mesh)
    check_layouts(mesh)
    check_transformer(mesh)
    check_parallel_dropout(mesh)
    check_refusals(mesh)


@pytest.mark.slow
def test_tensor_parallel(tmp_path):
    run_in_two_processes(tensor_parallel, tmp_path)


# ---- Ring ----------------------------------------------------------------------------------------


def ring_problem(query_heads=4, key_heads=4, query_length=7, key_length=7, **others):
    return (
        dict(
            query=make(B, query_heads, query_length, 4),
            key=make(B, key_heads, key_length, 4),
            value=make(B, key_heads, key_length, 3),
        )
        | others
    )


def check_ring(rank, problem, query_at, key_at, order="contiguous", tolerance=None, **options):
    """query_at, key_at: positions that each process holds."""
    from torch_selfattn.distributed import ring_attention

    leaf = {
        name: x.clone().requires_grad_(x.is_floating_point()) for name, x in problem.items()
    }  # fmt: skip
    weight = leaf.get("weight")
    others = {n: x for n, x in leaf.items() if n not in ("query", "key", "value", "weight")}
    shared = others | options
    q, k, v = leaf["query"], leaf["key"], leaf["value"]
    want = (
        ts.dot_product_attention(q, k, v, **shared)
        if weight is None
        else ts.additive_attention(q, k, v, weight, **shared)
    )
    grad = torch.randn_like(want)
    names = [name for name, x in leaf.items() if x.requires_grad]
    wanted = dict(
        zip(names, torch.autograd.grad(want, [leaf[n] for n in names], grad), strict=True)
    )  # fmt: skip

    def piece(name, x):
        at = {"query": query_at, "key": key_at, "value": key_at}.get(name)
        return x.detach() if at is None else x.detach()[:, :, at[rank]]

    mine = {n: piece(n, x).clone().requires_grad_(n in names) for n, x in leaf.items()}
    saved = []

    def pack(x):
        saved.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        got = ring_attention(**mine, **options, order=order)
    # What is kept for backward: this process's piece only.
    assert all(s[2] <= max(len(query_at[rank]), len(key_at[rank])) for s in saved if len(s) > 2)
    torch.testing.assert_close(got, want[:, :, query_at[rank]], **(tolerance or {}))
    got.backward(grad[:, :, query_at[rank]])
    for name in names:
        total = mine[name].grad
        if name in ("weight", "alibi_slopes"):
            dist.all_reduce(total)  # each process has its share
        torch.testing.assert_close(
            total,
            piece(name, wanted[name]),
            **(tolerance or {}),
            msg=lambda m, n=name: f"{n}: {m}",
        )


def cut(length, first):
    positions = torch.arange(length)
    return [positions[:first], positions[first:]]


def check_ring_results(rank):
    lengths = {"key_lengths": torch.tensor([5, 7]), "key_starts": torch.tensor([0, 4])}
    for first in (3, 6, 0):
        at = cut(7, first)
        for options in ({}, {"is_causal": True}, {"window_left": 2, "window_right": 1}):
            for others in ({}, {"alibi_slopes": make(4)}, lengths):
                check_ring(rank, ring_problem(**others), at, at, **options)
                for activation in ("tanh", "leaky_relu"):
                    problem = ring_problem(**others, weight=make(4, 4))
                    check_ring(rank, problem, at, at, activation=activation, **options)
    at = cut(7, 4)
    grouped = ring_problem(key_heads=2, weight=make(4))
    check_ring(rank, grouped, at, at, enable_gqa=True, is_causal=True, scale=0.3)
    check_ring(rank, ring_problem(key_heads=1), at, at)
    for name, slope in (("relu", 0.2), ("leaky_relu", -0.5)):
        problem = ring_problem(weight=make(4, 4))
        check_ring(rank, problem, at, at, activation=name, negative_slope=slope)
    # Queries of another length than the keys.
    for options in ({}, {"is_causal": True}):
        problem = ring_problem(query_length=4)
        check_ring(rank, problem, cut(4, 1), cut(7, 4), **options)
    # Keys that nobody sees, and a NaN among them.
    problem = ring_problem(key_lengths=torch.tensor([0, 2]))
    problem["value"][:, :, 5] = torch.nan
    check_ring(rank, problem, at, at)


def check_zigzag(rank):
    from torch_selfattn.distributed import ring_positions

    at = [torch.tensor([0, 1, 6, 7]), torch.tensor([2, 3, 4, 5])]
    assert ring_positions(8, order="zigzag").tolist() == at[rank].tolist()
    assert ring_positions(7).tolist() == [[0, 1, 2, 3], [4, 5, 6]][rank]
    for options in ({}, {"is_causal": True}, {"window_left": 1, "window_right": 2}):
        for weight in ({}, {"weight": make(4, 4), "alibi_slopes": make(4)}):
            problem = ring_problem(query_length=8, key_length=8, **weight)
            check_ring(rank, problem, at, at, "zigzag", **options)
    with pytest.raises(ValueError, match="multiple of twice the number of processes"):
        ring_positions(6, order="zigzag")


def check_precision(rank):
    """Half precision is joined in float32: as near as one process comes; and autocast."""
    from torch_selfattn.distributed import ring_attention

    at = cut(64, 40)
    q, k, v = torch.randn(3, B, 4, 64, 16)
    for dtype, tolerance in (
        (torch.float32, {"rtol": 1e-5, "atol": 1e-5}),
        (torch.bfloat16, {"rtol": 2e-2, "atol": 2e-2}),
    ):
        problem = {"query": q.to(dtype), "key": k.to(dtype), "value": v.to(dtype)}
        check_ring(rank, problem, at, at, tolerance=tolerance, is_causal=True)
    mine = [x[:, :, at[rank]].clone().requires_grad_() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        got = ring_attention(*mine)
        want = ts.dot_product_attention(q, k, v)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want[:, :, at[rank]], rtol=2e-2, atol=2e-2)
    got.sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in mine)
    x = mine[0].detach().requires_grad_()
    with pytest.raises(NotImplementedError, match="differentiated once only"):
        torch.autograd.grad(ring_attention(x, x, x).sum(), x, create_graph=True)


def check_errors(rank):
    """On both processes, whichever is wrong."""
    from torch_selfattn.distributed import ring_attention

    x = make(2, 4, 4, 4)

    def refuse(message, other, kind=RuntimeError, query=x, key=x, value=x, **options):
        """other: what the process says whose arguments are right, None if none is."""
        dist.barrier()
        text = message if rank == 0 or other is None else other
        with pytest.raises(kind if rank == 0 or other is None else RuntimeError, match=text):
            ring_attention(query, key, value, **options)

    elsewhere = r"right on every process \(got an error on rank 0"
    bad = rank == 0
    refuse("must have four dimensions", elsewhere, query=x[0] if bad else x)
    refuse("must have one batch size", elsewhere, key=x[:1] if bad else x)
    refuse("must have the same head dim", elsewhere, query=x[..., :3] if bad else x)
    refuse("heads of key and value must divide", elsewhere, query=x[:, :3] if bad else x)
    refuse("unless enable_gqa", None, key=x[:, :2], value=x[:, :2])
    refuse("key_lengths must have one element", None, key_lengths=torch.tensor([1]))
    refuse("alibi_slopes must have the shape", None, alibi_slopes=make(2, 4))
    refuse("weight must have the shape", elsewhere, weight=make(3, 4) if bad else make(4))
    refuse("order must be", None, ValueError, order="up")
    refuse("activation belongs to the additive", None, ValueError, activation="relu")
    refuse("activation must be tanh", None, ValueError, activation="gelu", weight=make(4))
    refuse(
        "activation must be the same.*relu.*tanh", None, weight=make(4),
        activation="relu" if bad else "tanh",
    )  # fmt: skip
    refuse(
        r"negative_slope must be the same.*0\.1.*-2", None, weight=make(4),
        activation="leaky_relu", negative_slope=0.1 if bad else -2.0,
    )  # fmt: skip
    refuse("window_left must be", elsewhere, ValueError, window_left=-2 if bad else 1)
    refuse("must be on the device of query", elsewhere, value=x.to("meta") if bad else x)
    refuse("is_causal must be the same", None, is_causal=bad)
    refuse("scale must be the same.*0.5", None, scale=0.5 if bad else 0.25)
    refuse("the batch size must be the same", None, **dict.fromkeys(
        ("query", "key", "value"), x[:1] if bad else x
    ))  # fmt: skip
    y = x.float() if bad else x
    refuse("the dtype must be the same.*float32.*float64", None, query=y, key=y, value=y)
    refuse("a gradient is wanted", None, query=x.clone().requires_grad_(bad))
    refuse("key_lengths must be the same", None, key_lengths=torch.tensor([1, 2 + rank]))
    refuse("key_lengths must be between 0 and the length of the whole", None, ValueError,
           key_lengths=torch.tensor([1, 9]))  # fmt: skip
    y = x[:, :, : 3 + rank]
    refuse("same even length for order='zigzag'", None, query=y, key=y, value=y, order="zigzag")
    ring_attention(x, x, x)  # nothing is left on the way


def ring(rank):
    from torch_selfattn.distributed import ring_attention

    check_ring_results(rank)
    check_zigzag(rank)
    check_precision(rank)
    check_errors(rank)
    # In a group that is not all, of one process.
    groups = [dist.new_group([r]) for r in range(2)]
    x = make(1, 2, 5, 4)
    torch.testing.assert_close(
        ring_attention(x, x, x, group=groups[rank], is_causal=True),
        ts.dot_product_attention(x, x, x, is_causal=True),
    )


def test_ring_attention(tmp_path):
    run_in_two_processes(ring, tmp_path)
