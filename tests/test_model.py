"""Invariants 1 to 5 of DESIGN section 7, on random non-unit weights and several shapes."""
import dataclasses
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from conftest import SHAPES, randomised, same, some_memory, some_tokens
from memory import SessionMemory, dopamine, read_session
from model import (HEAD_ENTRIES, BackboneConfig, Cache, CTMBlock, NanoCTM, Sync, ThoughtConfig,
                   generate, load_backbone, load_graft, mean_and_square, rms, save_backbone,
                   save_graft)

# -----------------------------------------------------------------------------
# invariant 1: the backbone is Qwen3

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.0)])
def test_backbone_equals_transformers_qwen3(shape, dtype, tolerance):
    from transformers import Qwen3Config, Qwen3ForCausalLM
    model = randomised(shape, "ffn")
    oracle = Qwen3ForCausalLM(Qwen3Config(**model.backbone.config.to_json(),
                                          attn_implementation="sdpa")).eval()
    oracle.load_state_dict({f"model.{k}": v for k, v in model.backbone.state_dict().items()}
                           | {"lm_head.weight": model.backbone.embed_tokens.weight})
    inverse = oracle.model.rotary_emb.inv_freq.clone()
    model, oracle = model.to(dtype), oracle.to(dtype)
    oracle.model.rotary_emb.inv_freq = inverse                      # rounded by .to, not by loading
    tokens = some_tokens(model, 2, 33)
    with torch.no_grad():
        theirs = oracle(tokens).logits.float()
        mine = model.head(model(tokens).hidden[:, :, 0]).float()
    assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_a_saved_backbone_is_read_by_transformers_and_by_us(tmp_path):
    from transformers import AutoModelForCausalLM
    model = randomised("grouped queries", "ffn")
    save_backbone(model, tmp_path)
    oracle, ours = (AutoModelForCausalLM.from_pretrained(tmp_path).eval(),
                    load_backbone(str(tmp_path)))
    tokens = some_tokens(model, 1, 20)
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, model(tokens).logits)
        same(oracle(tokens).logits, model(tokens).logits)


def test_rope_theta_is_found_at_the_top_and_in_rope_parameters(tmp_path):
    import json
    raw = BackboneConfig(97, 64, 96, 3, 4, 2, 16, rope_theta=123.0).to_json()
    for config in (raw, {k: v for k, v in raw.items() if k != "rope_parameters"}
                   | {"rope_theta": 123.0}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert BackboneConfig.from_json(tmp_path).rope_theta == 123.0


# -----------------------------------------------------------------------------
# invariants 2 and 3: one model, whether it reads at once or token by token

def same_thought(a, b) -> None:
    """Every tick's hidden states agree, and the read tick too unless certainties tie."""
    for field in ("hidden", "keys", "delta_alpha", "delta_beta"):
        same(getattr(a, field), getattr(b, field))
    for row in (a.read_tick != b.read_tick).nonzero().tolist():
        top = a.certainty[tuple(row)].topk(2).values
        assert top[0] - top[1] < 1e-5


def joined(thoughts: list):
    parts = {f.name: [getattr(t, f.name) for t in thoughts]
             for f in dataclasses.fields(thoughts[0])}
    whole = {k: torch.cat(v, 1) for k, v in parts.items() if isinstance(v[0], torch.Tensor)}
    return dataclasses.replace(thoughts[-1], **whole)


def padded(tokens: torch.Tensor) -> torch.Tensor:
    """Row 0 whole, row 1 padded on the left, row 2 with a hole in the middle."""
    tokens = tokens.clone()
    tokens[1, :5], tokens[2, 7:10] = -1, -1
    return tokens


@pytest.mark.parametrize("halt", [None, 0.3])
def test_token_by_token_equals_one_parallel_pass_with_padding(model, halt):
    tokens = padded(some_tokens(model, 3, 24))
    whole = model(tokens, halt=halt)
    cache, steps = None, []
    for t in range(tokens.shape[1]):
        steps.append(model(tokens[:, t:t + 1], cache, halt=halt))
        cache = steps[-1].cache
    if halt is None:
        step = joined(steps)
        real = tokens >= 0
        same(model.head(step.hidden)[real], model.head(whole.hidden)[real])
        same_thought(*[
            dataclasses.replace(x, **{k: getattr(x, k)[real][None] for k in (
                "hidden", "keys", "delta_alpha", "delta_beta", "certainty", "read_tick")})
            for x in (step, whole)])
    else:                                                           # stops early, the same answer
        used = [s.hidden.shape[2] for s in steps]
        assert min(used) < model.ctm.config.ticks or (whole.certainty[..., 0] < halt).all()
        for t, s in enumerate(steps):
            real = tokens[:, t] >= 0
            assert torch.equal(s.read_tick[real, 0], whole.read_tick[real, t])
            same(s.logits[real, 0], whole.logits[real, t])
            same(s.delta_alpha[real, 0], whole.delta_alpha[real, t])


def test_rows_that_end_in_padding_think_as_they_do_alone(model):
    """Without a mask, which keeps a GPU's fastest attention away."""
    tokens = some_tokens(model, 3, 24)
    tokens[1, 9:], tokens[2, 23:] = -1, -1
    assert Cache().places(tokens, (16, 16), 1e4)[0].allowed is None
    together = model(tokens)
    for row, n in enumerate((24, 9, 23)):
        alone = model(tokens[row:row + 1, :n])
        same(together.hidden[row, :n], alone.hidden[0])
        same(together.delta_alpha[row, :n], alone.delta_alpha[0])


def test_the_derivative_of_rms_is_its_own():
    x = torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rms(x, 1e-3), x)


@pytest.mark.parametrize("split", [1, 9, 23])
def test_a_prefill_split_anywhere_equals_one_prefill(model, split):
    tokens = some_tokens(model, 2, 24)
    first = model(tokens[:, :split])
    same_thought(joined([first, model(tokens[:, split:], first.cache)]), model(tokens))


@pytest.mark.parametrize("chunk", [1, 5, 8])
def test_session_sums_of_decode_equal_those_of_chunked_prefill_with_padding(model, chunk):
    tokens = padded(some_tokens(model, 3, 24))
    # a hole would need its own calls; left padding does not
    tokens[2] = tokens[0]
    model.ctm.log_half_life.copy_(torch.rand_like(model.ctm.log_half_life) * 2 + 1)
    following = torch.cat([tokens[:, 1:], torch.full((3, 1), -1)], 1)

    def live(step: int) -> SessionMemory:
        session, cache, at = SessionMemory(model, 3, chunk), None, 0
        while at < 24:
            n = min(step, session.room(), 24 - at)
            thought = model(tokens[:, at:at + n], cache, m=session.m)
            session.observe(thought, following[:, at:at + n])
            cache, at = thought.cache, at + n
        return session

    one, many = live(1), live(chunk)
    for a, b in zip((*one.sums, one.m), (*many.sums, many.m)):
        same(a, b)
    assert not torch.allclose(one.m, SessionMemory(model, 3, chunk).m)


def test_a_session_adds_what_it_synchronised_at_every_tick_and_a_fresh_one_nothing(model):
    tokens, other = some_tokens(model, 2, 9), some_tokens(model, 2, 12, seed=1)
    m, fresh = read_session(model, other, chunk=4)[0].m, SessionMemory(model, 2).m
    parts = model.trunk(tokens)
    carried, alone, begun = (model.ticks(*parts, m=x) for x in (m, None, fresh))
    added = model.ctm.session_key(m) @ model.ctm.session_proj.T
    same(carried.out, model.ctm.c_proj(carried.keys) + added[:, None, None])
    assert torch.equal(alone.out, begun.out) and added.abs().max() > 1e-3
    thought = model(tokens)                                         # a session of one has its key
    one = (thought.delta_alpha / thought.delta_beta)[:, 0]
    same(model.ctm.session_key(one), thought.keys[:, 0, -1])


def test_a_session_shorter_than_a_chunk_is_carried_too_whatever_its_padding(model):
    tokens = some_tokens(model, 1, 7)
    pad = torch.full((1, 5), -1)
    alone = read_session(model, tokens, chunk=8)[0].m
    both = read_session(
        model, torch.cat([torch.cat([tokens, pad], 1), torch.cat([pad, tokens], 1)]), chunk=8)[0].m
    assert ((both - alone).abs().max() < 1e-5
            and not torch.allclose(alone[0], model.ctm.fresh_sync()))


def test_carried_sums_equal_the_formula_of_a_closed_chunk():
    model = randomised("grouped queries")
    tokens = some_tokens(model, 2, 8)
    session, thought = SessionMemory(model, 2, 8), model(tokens)
    session.observe(thought, torch.cat([tokens[:, 1:], torch.full((2, 1), -1)], 1))
    weight = dopamine(thought.nats.nan_to_num(), model.ctm.mean_surprise)
    weight[:, -1] = 0                                               # what followed it is unknown
    decay = (model.ctm.gamma(torch.tensor(1))                       # gamma^(n-1-j)
             ** torch.arange(7, -1, -1)[:, None, None])
    expected = [(decay * weight[:, :, None, None] * d).sum(1)
                for d in (thought.delta_alpha, thought.delta_beta)]
    for found, sums in zip(session.sums, expected):
        assert torch.allclose(found, sums, atol=1e-5)
    assert torch.allclose(session.m, expected[0] / expected[1], atol=1e-5)


# -----------------------------------------------------------------------------
# invariants 4 and 5

@pytest.mark.parametrize("changed", [0, 11, 23])
def test_changing_a_token_changes_nothing_before_it_in_any_tick(model, changed):
    tokens = some_tokens(model, 1, 24)
    other = tokens.clone()
    other[0, changed] = (other[0, changed] + 1) % model.backbone.config.vocab_size
    a, b = model(tokens), model(other)
    assert (torch.equal(a.hidden[:, :changed], b.hidden[:, :changed])
            and torch.equal(a.keys[:, :changed], b.keys[:, :changed]))
    assert (a.hidden[:, changed] - b.hidden[:, changed]).abs().min() > 0


def test_recurrent_sync_equals_the_direct_weighted_sum():
    torch.manual_seed(0)
    sync, K = Sync(20, ThoughtConfig(sync=50)), 32
    z, alpha, beta = torch.randn(K, 3, 20), 0, 0
    for k in range(K):
        alpha, beta = sync.r() * alpha + sync.pair(z[k]), sync.r() * beta + 1
    weight = torch.exp(-sync.decay.clamp(0, 15) * torch.arange(K - 1, -1, -1)[:, None]) # (K, S)
    direct = (weight[:, None] * z[:, :, sync.left] * z[:, :, sync.right]).sum(0)
    assert (torch.allclose(alpha, direct, atol=1e-5)
            and torch.allclose(beta, weight.sum(0), atol=1e-5))


# -----------------------------------------------------------------------------
# the block itself

def test_keys_of_two_random_inputs_differ_at_initialisation():
    torch.manual_seed(0)
    model = NanoCTM(*SHAPES["grouped queries"])
    y = model.ticks(*model.trunk(some_tokens(model, 1, 64))).y_out[-1][0]
    cosine = torch.nn.functional.cosine_similarity(y[:32], y[32:], dim=-1)
    assert cosine.mean() < 0.5


def test_keys_do_not_depend_on_what_is_read_out(model):
    tokens = some_tokens(model, 2, 12)
    W = some_memory(model)
    a, b = model(tokens), model(tokens, plastic=W)
    assert torch.equal(a.keys, b.keys) and not torch.allclose(a.hidden, b.hidden)
    model.ctm.read_along(0)
    W = some_memory(model)
    b = model(tokens, plastic=W)
    # without features a memory can be folded into c_proj
    model.ctm.c_proj.weight.data += W / math.sqrt(model.ctm.config.sync)
    assert torch.allclose(model(tokens).hidden, b.hidden, atol=1e-5)


def test_a_memory_for_each_row_is_that_rows_memory(model):
    tokens = some_tokens(model, 3, 9)
    W = torch.stack([some_memory(model) for _ in range(3)])
    together = model(tokens, plastic=W).hidden
    for row in range(3):
        same(together[row], model(tokens[row:row + 1], plastic=W[row]).hidden[0])


def test_keys_have_unit_root_mean_square(model):
    keys = model(some_tokens(model, 1, 12)).keys
    assert torch.allclose(keys.pow(2).mean(-1), torch.ones(keys.shape[:-1]), atol=1e-2)


def test_qwen_unet_has_the_widths_and_the_size_of_the_design():
    with torch.device("meta"):
        model = NanoCTM(BackboneConfig())
    widths = [layer.out_features for layer in model.ctm.synapse.down]
    assert (widths == [*range(1920, 0, -128), 16]
            and [l.out_features for l in model.ctm.synapse.up][-1] == 1024)
    assert 62e6 < sum(p.numel() for p in model.ctm.parameters()) < 72e6
    assert 590e6 < sum(p.numel() for p in model.backbone.parameters()) < 600e6


def test_a_bfloat16_backbone_thinks_in_bfloat16_with_fp32_sums(model):
    tokens = some_tokens(model, 2, 20)
    exact = model(tokens)
    model.backbone.to(torch.bfloat16)
    state = model.ctm.start(model.trunk(tokens)[1])
    thought = model(tokens)
    assert thought.hidden.dtype == state.z.dtype == torch.bfloat16  # nothing promoted the block
    assert thought.keys.dtype == thought.delta_alpha.dtype == torch.float32
    assert ((thought.hidden - exact.hidden).pow(2).mean().sqrt()
            < 0.1 * exact.hidden.pow(2).mean().sqrt())
    step = model(tokens[:, 10:], model(tokens[:, :10]).cache)
    assert ((step.hidden - thought.hidden[:, 10:]).float().pow(2).mean().sqrt()
            < 0.1 * exact.hidden.pow(2).mean().sqrt())


def test_checkpointed_ticks_give_the_same_gradients():
    grads = []
    for keep in (False, True):
        model = randomised("grouped queries").requires_grad_(True)
        model.checkpoint_ticks = keep
        tokens = some_tokens(model, 2, 10)
        loss, _ = model.tick_loss(model(tokens), tokens.roll(-1, 1), torch.ones(2, 10))
        loss.backward()
        grads.append({n: p.grad for n, p in model.ctm.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and all(
        torch.allclose(grads[0][n], grads[1][n], atol=1e-6) for n in grads[0])


def test_thinking_about_some_tokens_changes_nothing_for_them(model):
    tokens = padded(some_tokens(model, 3, 24))
    for given in (tokens, tokens.clamp(min=0)):
        where = torch.tensor([[0, 3, 23], [6, 9, 11], [1, 2, 20]])
        whole, some = (model.ticks(*model.trunk(given)),
                       model.ticks(*model.trunk(given), where=where))
        for row in range(3):
            same(some.out[row], whole.out[row, where[row]])
            assert torch.equal(some.real[row], whole.real[row, where[row]])


def test_a_brief_thought_is_the_beginning_of_a_long_one(model):
    trunk = model.trunk(padded(some_tokens(model, 3, 24)))
    whole, brief = model.ticks(*trunk), model.ticks(*trunk, number=1)
    same(brief.out, whole.out[:, :, :1])
    same(brief.keys, whole.keys[:, :, :1])
    assert brief.delta_alpha.shape == whole.delta_alpha.shape       # sums at its own last tick
    assert not torch.equal(brief.delta_alpha, whole.delta_alpha)


def test_tick_loss_is_the_mean_of_the_best_and_the_most_certain_tick():
    model = randomised("more pairs than neurons")
    tokens = some_tokens(model, 2, 16)
    thought = model(tokens)
    weight = torch.ones(2, 16)
    weight[:, -1] = 0
    loss, report = model.tick_loss(thought, tokens.roll(-1, 1), weight, "best")
    expected = (thought.tick_nats.min(-1).values + thought.nats)[:, :-1].mean() / 2
    assert (torch.allclose(loss, expected, atol=1e-5)
            and report["nats"] == pytest.approx(thought.nats[:, :-1].mean().item(), abs=1e-5))


def test_no_channel_owns_the_key_once_its_spread_is_known(model):
    """Settled on a text, every channel of the key has about the same power there,
    however loud a neuron is."""
    model.ctm.nlm.b2.data[0] += 30.0
    tokens = some_tokens(model, 4, 60)
    model.ctm.settle(*mean_and_square(model.ticks(*model.trunk(tokens))), 1.0)
    power = model(tokens).keys.pow(2).mean((0, 1))                  # (K, S)
    assert power.max() < 8 and power.median() > 0.25


def test_a_teacher_is_half_of_what_a_tick_learns():
    """Taught by itself, a model's soft half costs its entropy, and has no gradient left."""
    model = randomised("more pairs than neurons")
    tokens, weight = some_tokens(model, 2, 16), torch.ones(2, 16)
    weight[:, -1] = 0
    thought = model(tokens)
    teacher = thought.at_read_tick(thought.hidden).detach()
    nats, entropy = (thought.nats[:, :-1],
                     torch.special.entr(model.head(teacher[:, :-1]).softmax(-1)).sum(-1))
    single = dataclasses.replace(
        thought, hidden=thought.at_read_tick(thought.hidden)[:, :, None],
        tick_nats=thought.nats[..., None], read_tick=torch.zeros_like(thought.read_tick))
    loss, report = model.tick_loss(single, tokens.roll(-1, 1), weight, teacher=teacher)
    assert (torch.allclose(loss, (nats.mean() + entropy.mean()) / 2, atol=1e-5)
            and report["nats"] == pytest.approx(nats.mean().item(), abs=1e-5))
    hidden = teacher.clone().requires_grad_()
    expected = model.head(teacher).softmax(-1)                      # that the other half learns
    expected[torch.arange(2)[:, None], torch.arange(16), tokens] -= 1
    loss, _ = model.reading_loss(hidden.flatten(0, 1)[:, None], tokens.flatten(), torch.ones(32),
                                 teacher.flatten(0, 1))
    wanted, = torch.autograd.grad(model.head(hidden), hidden, expected / 2)
    same(torch.autograd.grad(loss, hidden)[0], wanted)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_reading_loss_is_cross_entropy_with_its_gradients_however_it_is_cut(
        dtype, tolerance, monkeypatch):
    model = randomised("more pairs than neurons").requires_grad_(True).to(dtype)
    D, V = model.backbone.config.hidden_size, model.backbone.config.vocab_size
    hidden = torch.randn(7, 2, D, dtype=dtype, requires_grad=True)
    teacher, targets, weight = (torch.randn(7, D, dtype=dtype), torch.randint(V, (7,)),
                                torch.rand(7))
    learning = [hidden, model.backbone.embed_tokens.weight, model.backbone.norm.weight]

    def close(a: torch.Tensor, b: torch.Tensor) -> bool:
        return bool((a - b).abs().max() <= tolerance * b.abs().max())
    log_p = model.head(hidden).float().log_softmax(-1)
    nats = -log_p[torch.arange(7), :, targets]
    taught = -(model.head(teacher).float().softmax(-1).detach()[:, None] * log_p).sum(-1)
    for rows in (100, 4, 1):
        monkeypatch.setitem(HEAD_ENTRIES, "cpu", rows * V)
        for aside, expected in ((None, nats), (teacher, (nats + taught) / 2)):
            wanted = (expected.mean(1) * weight).sum()
            loss, found = model.reading_loss(hidden, targets, weight, aside)
            assert close(loss, wanted) and close(found, nats) and not found.requires_grad
            assert all(map(close, torch.autograd.grad(3 * loss, learning),
                           torch.autograd.grad(3 * wanted, learning, retain_graph=True)))
    for aside in (None, teacher[:0]):                               # a chunk of padding alone
        loss, found = model.reading_loss(hidden[:0], targets[:0], weight[:0], aside)
        assert loss == 0 and found.shape == (0, 2)
        assert not torch.autograd.grad(loss, hidden)[0].any()


def test_a_tick_by_chance_stands_for_the_mean_over_ticks():
    model = randomised("more pairs than neurons")
    tokens, weight = some_tokens(model, 2, 16), torch.ones(2, 16)
    weight[:, -1] = 0
    thought = model(tokens)
    drawn = torch.stack([model.tick_loss(thought, tokens.roll(-1, 1), weight)[0]
                         for _ in range(300)])
    expected = (thought.tick_nats.mean(-1) + thought.nats)[:, :-1].mean() / 2
    assert ((drawn.mean() - expected).abs() < 4 * drawn.std() / 300 ** 0.5  # four standard errors
            and drawn.std() > 0)


@pytest.mark.parametrize("every", (2, 3))
def test_a_sparse_tick_loss_is_the_same_in_the_mean_and_so_is_its_gradient(every):
    model = randomised("more pairs than neurons").requires_grad_(True)
    tokens, weight = some_tokens(model, 2, 12), torch.rand(2, 12)
    weight[:, -1] = 0
    following, learning = tokens.roll(-1, 1), [model.ctm.c_proj.weight, model.ctm.q_proj.weight]

    def mean(draw, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard error over draws of a loss and of its gradient, along themselves."""
        drawn = []
        for _ in range(number):
            loss = draw()
            drawn.append(torch.cat([loss.detach()[None], *map(torch.flatten, torch.autograd.grad(
                loss, learning))]))
        drawn = torch.stack(drawn)
        return drawn.mean(0), drawn.std(0) / number ** 0.5

    dense, of_dense = mean(lambda: model.tick_loss(model(tokens), following, weight)[0], 100)
    sparse, of_sparse = mean(lambda: model.sparse_tick_loss(
        model.ticks(*model.trunk(tokens)), following, weight, every)[0], 200)
    off = (sparse - dense) / torch.sqrt(of_dense ** 2 + of_sparse ** 2)
    assert off[0].abs() < 4 and 0 < off.std() < 1.3 and (of_sparse > 0).all()   # standard errors

    teacher = torch.randn(2, 12, model.backbone.config.hidden_size)
    _, report, thought = model.sparse_tick_loss(model.ticks(*model.trunk(tokens)), following, weight,
                                                every, teacher)
    whole = model(tokens)
    first = next(i for i in range(every) if torch.equal(thought.hidden, whole.hidden[:, i::every]))
    same(thought.key, whole.key[:, first::every])
    assert report["nats"] == pytest.approx(
        whole.nats[:, first::every][weight[:, first::every] > 0].mean().item(), abs=1e-5)


def test_memory_of_logits_is_bounded_and_the_pieces_agree(monkeypatch):
    import model as module
    model = randomised("grouped queries")
    tokens = some_tokens(model, 2, 30)
    whole = model(tokens)
    monkeypatch.setitem(module.HEAD_ENTRIES, "cpu", 97 * 7)
    pieces = model(tokens)
    assert torch.allclose(whole.tick_nats, pieces.tick_nats, atol=1e-5, equal_nan=True)
    assert torch.allclose(whole.certainty, pieces.certainty, atol=1e-5)


# -----------------------------------------------------------------------------
# generation, files

def test_temperature_zero_is_greedy_and_batches_do_not_disturb_each_other(model):
    a, b = some_tokens(model, 1, 12), some_tokens(model, 1, 7, seed=2)
    both = torch.cat([a, torch.cat([torch.full((1, 5), -1), b], 1)])
    said = torch.stack([s.token for s in generate(model, both, 6)], 1)
    for row, prompt in zip(said, (a, b)):
        for token in row.tolist():
            assert token == model(prompt).logits[0, -1].argmax()
            prompt = torch.cat([prompt, torch.tensor([[token]])], 1)


def test_generation_refuses_a_prompt_longer_than_the_context(model):
    with pytest.raises(ValueError, match="shorten the prompt"):
        next(generate(model, some_tokens(model, 1, 250), 10))


@pytest.mark.parametrize("block", ["ctm", "ffn"])
def test_a_graft_is_saved_alone_and_finds_its_base(tmp_path, block):
    model = randomised("grouped queries", block)
    save_backbone(model, tmp_path / "base")
    save_graft(model, tmp_path / "graft.safetensors")
    back = load_graft(str(tmp_path / "base"), tmp_path / "graft.safetensors")
    tokens, saved = some_tokens(model, 2, 12), back.state_dict()
    assert torch.equal(back(tokens).hidden, model(tokens).hidden)
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items() if "ctm" in k)
    save_backbone(randomised("grouped queries", "ffn", seed=5), tmp_path / "other")
    with pytest.raises(ValueError, match="expected the base it was trained on"):
        load_graft(str(tmp_path / "other"), tmp_path / "graft.safetensors")


def test_damaged_missing_and_foreign_weights_are_named_in_one_line(tmp_path):
    model = randomised("grouped queries")
    save_backbone(model, tmp_path / "base")
    whole = (tmp_path / "base" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="expected a graft of this project"):
        load_graft(str(tmp_path / "base"), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        load_backbone(str(tmp_path / "base"))
    with pytest.raises(ValueError, match="run `python train.py config/tiny_phase1.py` first"):
        (tmp_path / "empty").mkdir()
        load_backbone(str(tmp_path / "empty"))


# -----------------------------------------------------------------------------
# what memory reads

@pytest.mark.parametrize("size, expand", [(64, 500), (768, 7)])
def test_features_are_the_even_arc_cosine_kernel_of_whitened_keys(size, expand):
    """Over many of them: k, k' -> |x||x'| (sin + (pi / 2 - angle) cos), of x = L^-1 k. Half of the
    tolerance is chance; signs and one transform fall short of it where S is small (0.1 at 16)."""
    torch.manual_seed(0)
    ctm = CTMBlock(8, ThoughtConfig(sync=size, head_dim=8, expand=expand), 1e-6)
    ctm.key_moment.copy_(torch.diag(torch.linspace(0.01, 0.1, size)))
    ctm.whiten()
    keys = torch.nn.functional.normalize(torch.randn(30, size, dtype=torch.float64), dim=1)
    read, white = ctm.features(keys), keys @ ctm.white.double().T
    length = white.norm(dim=1)
    angle = (white @ white.T / torch.outer(length, length)).clamp(-1, 1).acos()
    kernel = torch.outer(length, length) * (angle.sin() + (math.pi / 2 - angle) * angle.cos())
    found = read @ read.T
    assert (found / found.mean() - kernel / kernel.mean()).abs().max() < 0.04


@pytest.mark.parametrize("size", [1, 16, 21])
def test_keys_are_turned_by_rotations_that_differ(size):
    ctm = CTMBlock(8, ThoughtConfig(sync=size, head_dim=8, expand=3), 1e-6)
    turns = ctm.turned(torch.eye(size, dtype=torch.float64)).T.split(size)
    for turn in turns:
        assert torch.allclose(turn @ turn.T, torch.eye(size, dtype=torch.float64))
    assert size == 1 or not torch.equal(turns[0], turns[1])
    assert torch.autograd.gradcheck(ctm.turned, torch.randn(2, size, dtype=torch.float64,
                                                            requires_grad=True))


def test_a_block_that_reads_along_fewer_features_is_one_made_so():
    made, turned = (CTMBlock(8, ThoughtConfig(sync=64, head_dim=8, expand=expand), 1e-6)
                    for expand in (3, 7))
    made.load_state_dict(turned.state_dict())
    turned.read_along(3)
    key = torch.nn.functional.normalize(torch.randn(5, 64), dim=1)
    assert turned.config == made.config and torch.equal(turned.features(key), made.features(key))


def test_moments_of_features_are_those_of_normal_keys():
    torch.manual_seed(0)
    ctm = CTMBlock(8, ThoughtConfig(sync=64, head_dim=8, expand=2), 1e-6)
    root = torch.randn(64, 64) / 64
    ctm.key_moment.copy_(root @ root.T)
    ctm.whiten()
    rows, rest = ctm.shared()
    moment = rows.T @ rows + rest.diag()
    read, due = (ctm.features(torch.randn(50_000, 64) @ root.T).double()
                 for root in (root, torch.eye(64) / 8))
    measured = read.T @ read / len(read)
    assert (measured - moment).diagonal().abs().max() < 0.03 * moment.diagonal().max()
    assert (measured - moment).norm() < 0.04 * moment.norm()        # rho^2 / 2 is left out
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, ctm.shared(), (rows, rest)))
    assert (read.pow(2).sum(1).mean() + due.pow(2).sum(1).mean()) / 2 == pytest.approx(1, rel=0.01)


def test_without_features_memory_reads_the_key_itself():
    ctm = CTMBlock(8, ThoughtConfig(sync=16, head_dim=8, expand=0), 1e-6)
    key, (rows, rest) = torch.randn(3, 16), ctm.shared()
    assert ctm.features(key) is key
    assert torch.allclose(rows.T @ rows + rest.diag(), ctm.key_moment.double(), atol=1e-7)


def test_a_loaded_block_reads_what_the_saved_one_did(model, tmp_path):
    save_backbone(model, tmp_path / "base")
    save_graft(model, tmp_path / "graft.safetensors")
    loaded = load_graft(str(tmp_path / "base"), tmp_path / "graft.safetensors")
    assert model.ctm.white.any() and torch.equal(loaded.ctm.white, model.ctm.white)


# -----------------------------------------------------------------------------
# a compiled thought

def test_what_is_compiled_for_one_tick_serves_every_tick_row_and_length():
    model = randomised("more pairs than neurons")
    model.ctm.requires_grad_(True)
    graphs = CompileCounter()
    torch.compiler.reset()
    model.ctm.think = torch.compile(model.ctm.think, backend=graphs, dynamic=True)
    counted = []
    for rows, length in ((2, 24), (1, 32), (3, 40)):
        model(some_tokens(model, rows, length)).hidden.sum().backward()
        counted.append(graphs.frame_count)
    with torch.no_grad():                                           # read along, never learned from
        model(some_tokens(model, 2, 24))
    assert counted + [graphs.frame_count] == [1, 1, 1, 2]
