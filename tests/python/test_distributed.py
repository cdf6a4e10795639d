"""DTensor sharding rules, DDP and FSDP2, each in two processes."""

import copy

import pytest
import torch
import torch.distributed as dist
import ways
from torch import nn
from two_processes import run_in_two_processes

import torch_selfattn as ts

# The processes import what they need of torch.distributed.tensor: it costs the others a second.

B, H, HK, LQ, LK, E = 4, 4, 2, 5, 6, 4
DTYPE = torch.float64


def make(*shape):
    return torch.randn(*shape, dtype=DTYPE)


def integers(high, *shape):
    return torch.randint(high, shape)


class Sharded:
    """Calls with DTensors against the same calls without."""

    def __init__(self):
        from torch.distributed.tensor import init_device_mesh

        import torch_selfattn.distributed  # registers the rules

        assert torch_selfattn.distributed.__all__
        self.mesh = init_device_mesh("cpu", (2,))

    def check(self, function, tensors, dims, output_dim, communicates=False, differentiable=True):
        """tensors by name; dims: the dimension each is sharded along, None where it is replicated.

        The output must be sharded along output_dim without communication, and so must the gradients
        of what is sharded; the others are partial sums.
        """
        from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
        from torch.distributed.tensor.debug import CommDebugMode

        def placement(dim):
            return [Replicate() if dim is None else Shard(dim)]

        whole = {
            name: x.clone().requires_grad_(x.is_floating_point()) for name, x in tensors.items()
        }
        names = [name for name, x in whole.items() if x.requires_grad]
        divided = {
            name: distribute_tensor(x.detach(), self.mesh, placement(dims[name])).requires_grad_(
                x.requires_grad
            )
            for name, x in whole.items()
        }
        want = function(**whole)
        with CommDebugMode() as communication:
            got = function(**divided)
        if not communicates:
            assert communication.get_total_counts() == 0
            assert list(got.placements) == placement(output_dim)
        torch.testing.assert_close(got.full_tensor(), want)
        if not differentiable:
            return

        grad = make(*want.shape)
        wanted = torch.autograd.grad(want, [whole[n] for n in names], grad, allow_unused=True)
        grads = torch.autograd.grad(
            got,
            [divided[n] for n in names],
            distribute_tensor(grad, self.mesh, got.placements),
            allow_unused=True,
        )
        for name, a, b in zip(names, grads, wanted, strict=True):
            assert (a is None) == (b is None), name
            if a is None:
                continue
            torch.testing.assert_close(a.full_tensor(), b, msg=lambda m, n=name: f"{n}: {m}")
            if not communicates:
                summed = [Partial()] if output_dim is not None else [Replicate()]
                expected = summed if dims[name] is None else placement(dims[name])
                assert list(a.placements) == expected, name


def heads(**others):
    return dict(query=make(B, H, LQ, E), key=make(B, HK, LK, E), value=make(B, HK, LK, E)) | others


WAYS = {
    "batch": dict.fromkeys(
        ("query", "key", "value", "key_lengths", "key_starts", "query_offsets"), 0
    ),
    "heads": dict.fromkeys(("query", "key", "value"), 1),
    "replicate": {},
}


def way_of(way, tensors, **dims):
    return {name: (WAYS[way] | dims).get(name) for name in tensors}


def check_attention(sharded):
    lengths = integers(LK, B) + 1
    for way, d in (("batch", 0), ("heads", 1), ("replicate", None)):

        def dot(**t):
            return ts.dot_product_attention(enable_gqa=True, window_right=1, **t)

        def additive(**t):
            return ts.additive_attention(enable_gqa=True, window_left=2, **t)

        # One after the other with the same shapes: DTensor must not take one for the other.
        for name in ("key_lengths", "key_starts", "query_offsets"):
            t = heads(**{name: lengths if name == "key_lengths" else lengths - 1})
            sharded.check(dot, t, way_of(way, t), d)
        t = heads(weight=make(H, E), alibi_slopes=make(B, H))
        by_head = 0 if way == "heads" else None
        sharded.check(additive, t, way_of(way, t, weight=by_head, alibi_slopes=d), d)
        t = heads(weight=make(E), alibi_slopes=make(H))
        sharded.check(additive, t, way_of(way, t, alibi_slopes=by_head), d)
        for shape in ((B, H, LQ, LK), (1, 1, LQ, LK), (B, 1, 1, LK), (1, H, LQ, 1)):
            t = heads(attn_mask=make(*shape))
            has = d is not None and shape[d] > 1
            sharded.check(dot, t, way_of(way, t, attn_mask=d if has else None), d)
            t["attn_mask"] = t["attn_mask"] > -1
            sharded.check(dot, t, way_of(way, t, attn_mask=d if has else None), d)
        t = heads(weight=make(H, E), alibi_slopes=make(H))
        del t["value"]

        def chosen(rows=None, average_heads=False, **t):
            return ts.attention_weights(
                enable_gqa=True, rows=rows, average_heads=average_heads, **t
            )  # fmt: skip

        dims = way_of(way, t, weight=by_head, alibi_slopes=by_head)
        sharded.check(chosen, t, dims, d)
        t["rows"] = torch.tensor([3, 0])
        # The gradient of a selection is PyTorch's index_add, which DTensor lacks in torch 2.11.
        known = torch.__version__ >= (2, 12)
        sharded.check(chosen, t, dims | {"rows": None}, d, differentiable=known)
        sharded.check(
            lambda **t: chosen(average_heads=True, **t), t, dims | {"rows": None}, d,
            communicates=way == "heads", differentiable=known,
        )  # fmt: skip


def check_what_is_gathered(sharded):
    """Right, though not without communication: other placements, and groups that do not divide."""
    from torch.distributed.tensor import DTensor

    t = heads()
    for d in (2, 3):
        dims = dict.fromkeys(t, d)
        sharded.check(
            lambda **t: ts.dot_product_attention(enable_gqa=True, **t), t, dims, None, True
        )
    t = dict(query=make(B, 2, LQ, E), key=make(B, 1, LK, E), value=make(B, 1, LK, E))
    dims = {"query": 1, "key": None, "value": None}
    sharded.check(lambda **t: ts.dot_product_attention(**t), t, dims, None, True)

    # The same shapes and placements, another argument: the lengths have to follow the batch.
    for name in ("key_lengths", "key_starts"):
        t = heads(**{name: torch.tensor([3, 1, 5, 2])})
        dims = dict.fromkeys(t, 0) | {name: None}
        sharded.check(lambda **t: ts.dot_product_attention(enable_gqa=True, **t), t, dims, 0, True)

    # lse and its gradient, both results in one loss
    def both(**t):
        output, lse = ts.dot_product_attention_with_lse(enable_gqa=True, **t)
        assert not isinstance(lse, DTensor) or lse.placements == output.placements
        return output + lse.unsqueeze(-1)

    def lse_alone(**t):
        return ts.dot_product_attention_with_lse(enable_gqa=True, **t)[1]

    t = heads()
    sharded.check(both, t, dict.fromkeys(t, 1), 1)
    sharded.check(lse_alone, t, dict.fromkeys(t, 1), 1)


def check_packed(sharded):
    """multi_head_attention, whose attention takes the projections as they are."""
    d = H * E

    def attend(x, weight, bias, out, score_weight=None, memory=None, **t):
        source = x if memory is None else memory
        return ts.multi_head_attention(
            x, source, source, H, [weight], [bias], out, num_kv_heads=HK,
            score_weight=score_weight, **t,
        )  # fmt: skip

    t = dict(
        x=make(B, LQ, d), weight=make(2 * d, d), bias=make(2 * d), out=make(d, d),
        score_weight=make(H, E), key_lengths=integers(LQ, B) + 1, alibi_slopes=make(H),
    )  # fmt: skip
    dims = dict.fromkeys(t) | {"x": 0, "key_lengths": 0}
    sharded.check(attend, t, dims, 0)
    t = {name: t[name] for name in ("x", "weight", "bias", "out")}
    t |= {"memory": make(B, LK, d), "attn_mask": make(B, 1, LQ, LK)}
    sharded.check(attend, t, dict.fromkeys(t) | {"x": 0, "memory": 0, "attn_mask": 0}, 0)
    sharded.check(attend, t, dict.fromkeys(t), None)


def check_positional(sharded):
    x = make(B, H, LQ, E)
    cos, sin = ts.rotary_tables(LK, E, dtype=DTYPE)
    ids = integers(LK, B, LQ)
    for d in (0, 1, None):
        for t in (
            {"position_ids": ids},
            {"position_ids": ids[0]},
            {"cos": cos[ids], "sin": sin[ids]},
            {"cos": cos[:LQ], "sin": sin[:LQ]},
        ):
            t = {"x": x, "cos": cos, "sin": sin} | t
            per_sample = {
                name: 0
                for name in ("cos", "sin", "position_ids")
                if d == 0 and name in t and t[name].dim() == (2 if name == "position_ids" else 3)
            }
            # Their gradient takes another road, composed of torch's operators.
            t["cos"], t["sin"] = t["cos"].detach(), t["sin"].detach()

            def rotate(x, cos, sin, position_ids=None):
                return ts.rotary_embedding(
                    x, cos.detach(), sin.detach(), position_ids=position_ids
                )  # fmt: skip

            sharded.check(rotate, t, dict.fromkeys(t) | {"x": d} | per_sample, d)
        for positions in (None, ids, ids[0]):
            t = {"x": x} | ({} if positions is None else {"positions": positions})
            dims = {"x": d, "positions": 0 if d == 0 and positions is ids else None}
            sharded.check(ts.add_sinusoidal_encoding, t, dims, d)
            t["table"] = make(LK, E)
            sharded.check(ts.add_learned_encoding, t, dims | {"table": None}, d)


def check_dropout(sharded):
    """After calls of the same shapes without: DTensor must not take one for the other."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    t = heads()
    x = make(B, LQ, H * E)
    for way in ([Shard(0)], [Shard(1)], [Replicate()]):
        divided = {name: distribute_tensor(y, sharded.mesh, way) for name, y in t.items()}
        packed = distribute_tensor(x, sharded.mesh, way)
        identity = distribute_tensor(torch.eye(H * E, dtype=DTYPE), sharded.mesh, [Replicate()])

        def module(x, eye, p):
            return ts.multi_head_attention(x, x, x, H, [torch.cat([eye] * 3)], [], eye, dropout_p=p)

        for call, whole in (
            (
                lambda p, d=divided: ts.dot_product_attention(dropout_p=p, enable_gqa=True, **d),
                lambda p: ts.dot_product_attention(dropout_p=p, enable_gqa=True, **t),
            ),
            (
                lambda p, x=packed, i=identity: module(x, i, p),
                lambda p: module(x, torch.eye(H * E, dtype=DTYPE), p),
            ),
        ):
            call(0.0)
            if way != [Replicate()]:
                if way == [Shard(1)] and call(0.0).dim() == 3:
                    continue  # a sequence is gathered by the projections
                with pytest.raises(NotImplementedError, match="dropout_p must be 0 for sharded"):
                    call(0.5)
            else:
                torch.manual_seed(3)
                got = call(0.5)
                torch.manual_seed(3)
                torch.testing.assert_close(got.full_tensor(), whole(0.5))


def sharding_rules(rank):
    sharded = Sharded()
    check_attention(sharded)
    check_what_is_gathered(sharded)
    check_packed(sharded)
    check_positional(sharded)
    check_dropout(sharded)


@pytest.mark.slow
@pytest.mark.way("DTensor", operators=ways.ATTENTION + ways.ENCODINGS)
def test_sharding_rules(tmp_path):
    run_in_two_processes(sharding_rules, tmp_path)


# ---- Data parallel -------------------------------------------------------------------------------


def encoder():
    torch.manual_seed(1)
    layer = ts.nn.TransformerEncoderLayer(
        16, 4, 32, dropout=0.0, batch_first=True, score="additive", num_kv_heads=2
    )
    return ts.nn.TransformerEncoder(layer, 2)


def train(model, x, target, steps=4):
    """Losses of a few steps; the mean over the batch, so that shards' means have its gradient as
    their mean."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x, is_causal=True), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def data_parallel(rank):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    torch.manual_seed(2)
    x, target = torch.randn(2, 4, 6, 16)
    alone = encoder()
    want = train(alone, x, target)
    mine = slice(2 * rank, 2 * rank + 2)

    def compare(model, parameters):
        losses = train(model, x[mine], target[mine])
        dist.all_reduce(losses)
        torch.testing.assert_close(losses / 2, want)
        assert want[-1] < 0.9 * want[0]
        for a, b in zip(parameters(model), alone.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

    replica = nn.parallel.DistributedDataParallel(encoder())
    compare(replica, lambda m: list(m.module.parameters()))

    mesh = init_device_mesh("cpu", (2,))
    model = encoder()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    one = model.layers[0].self_attn.in_proj_weight
    assert one.to_local().numel() == one.numel() // 2
    compare(model, lambda m: [p.full_tensor() for p in m.parameters()])
    whole = {name: x.full_tensor() for name, x in model.state_dict().items()}
    copy.deepcopy(alone).load_state_dict(whole)


def test_ddp_and_fsdp2(tmp_path):
    run_in_two_processes(data_parallel, tmp_path)
