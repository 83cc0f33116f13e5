"""The memory: what a session carries, what it writes, and a store that says exactly what it knows.
Invariants 2, 3, 5, 7, 8, 11."""
import dataclasses
import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conftest import randomised, same, some_memory, some_tokens
from memory import (Carry, Factors, Plastic, SessionMemory, Snapshot, Store, WriteRule, _sealed,
                    addresses, bearings, compact_memory, compact_sessions, empty_projector, engrams,
                    norm_ratio, output_change, read_session, superseded, whitened)
from model import Cache, generate

ROOT = Path(__file__).parent.parent


def some_factors(model, n: int, seed: int = 0) -> Factors:
    chance = torch.Generator().manual_seed(seed)
    D, S = model.ctm.c_proj.weight.shape
    keys = torch.nn.functional.normalize(torch.randn(n, S, generator=chance), dim=1)
    return Factors(keys, torch.randn(n, D, generator=chance),
                   *torch.rand(3, n, generator=chance).unbind(),
                   torch.arange(n), torch.arange(n) % 3)


def a_snapshot(model, seed: int = 0) -> Snapshot:
    chance = torch.Generator().manual_seed(seed)
    D, S = model.ctm.c_proj.weight.shape
    return Snapshot(torch.randn(2, S, generator=chance), torch.rand(2, S, generator=chance) + 1,
                    torch.randn(D, generator=chance))


# -----------------------------------------------------------------------------
# invariants 2 and 3: a session is the same however it is cut into calls

def lived(session: SessionMemory) -> tuple:
    factors = session.close()
    return *session.sums, session.m, *(torch.cat(column) for column in zip(*factors))


@pytest.mark.parametrize("chunk", [1, 8])
@pytest.mark.parametrize("cuts", [[1] * 24, [16, 8], [9, 1, 14]])
def test_a_session_read_in_any_pieces_is_the_same_session(model, chunk, cuts):
    tokens = some_tokens(model, 2, 24)
    model.ctm.log_half_life.copy_(torch.rand_like(model.ctm.log_half_life) * 2 + 1)
    plastic = some_memory(model)

    def read(pieces) -> tuple:
        session, cache = SessionMemory(model, 2, chunk, threshold=0.2), Cache()
        for piece in tokens.split(pieces, 1):
            cache = session.read(piece, cache, plastic).cache
        return lived(session)
    at_once = read([24])
    for whole, pieced in zip(at_once, read(cuts)):
        same(whole, pieced)
    assert len(at_once[3]) > 4


@pytest.mark.parametrize("cuts", [[1] * 70, [33, 37], [8, 62]])
def test_a_session_outlives_its_context_in_any_pieces(cuts):
    model = randomised("grouped queries")
    model.backbone.config = dataclasses.replace(model.backbone.config, max_position_embeddings=24)
    tokens, runs = some_tokens(model, 1, 70), []
    for pieces in ([70], cuts):
        session, cache = SessionMemory(model, 1, 8, threshold=0.2), Cache()
        for piece in tokens.split(pieces, 1):
            cache = session.read(piece, cache).cache
            assert cache.real.shape[1] <= 24
        runs.append(lived(session))
    for whole, pieced in zip(*runs):
        same(whole, pieced)


@pytest.mark.parametrize("chunk", [1, 5, 8])
def test_left_padding_changes_no_session(model, chunk):
    tokens = some_tokens(model, 1, 19)
    pad = torch.full((1, 5), -1)
    alone, _ = read_session(model, tokens, chunk)
    both, factors = read_session(model, torch.cat([
        torch.cat([pad, tokens], 1), torch.cat([tokens[:, 5:], tokens[:, :5] * 0 - 1, pad], 1)]),
        chunk, threshold=0.0)
    same(both.m[0], alone.m[0])
    same(both.sums.alpha[0], alone.sums.alpha[0])
    assert (factors[0].position.tolist() == list(range(18))
            and factors[1].position.tolist() == list(range(13)))


def test_a_session_goes_on_from_the_sums_of_another_and_keeps_none_of_them(model):
    """As if it had never ended, but that its context is gone; and its snapshot is its own."""
    first, then = some_tokens(model, 2, 16), some_tokens(model, 2, 11, seed=1)
    model.ctm.log_half_life.copy_(torch.rand_like(model.ctm.log_half_life) * 2 + 1)
    whole, _ = read_session(model, first, 8)
    went_on = SessionMemory(model, 2, 8)
    went_on.start(whole.sums)
    same(went_on.m, whole.m)
    fresh = SessionMemory(model, 2, 8)
    fresh.start(Carry(*(0 * x for x in whole.sums)))
    assert torch.equal(fresh.m, SessionMemory(model, 2).m)
    for session in (whole, went_on):
        session.read(then, Cache())
        session.close()
    same(went_on.m, whole.m)
    before = read_session(model, first, 8)[0].sums.faded(model.ctm.gamma(torch.full((2,), 11.0)))
    for own, of_both, inherited in zip(went_on.sums, whole.sums, before):
        same(own, of_both - inherited)
    assert torch.equal(went_on.snapshot(1, then[1]).alpha, went_on.sums.alpha[1])


def test_generating_with_a_session_equals_reading_what_was_said(model):
    prompt = some_tokens(model, 1, 11)
    session, said = SessionMemory(model, 1, 4, threshold=0.0), []
    for spoken in generate(model, prompt, 6, session=session):
        said.append(int(spoken.token))
    again = SessionMemory(model, 1, 4, threshold=0.0)
    thought = again.read(prompt, Cache())
    again.read(torch.tensor([said[:-1]]), thought.cache, own=5)
    for a, b in zip(lived(session), lived(again)):
        same(a, b)


def test_what_the_model_said_itself_is_carried_and_never_eligible(model):
    prompt, reply, question = (some_tokens(model, 1, n, seed=n) for n in (6, 5, 4))
    session = SessionMemory(model, 1, 4, threshold=0.0)
    cache = session.read(prompt, Cache()).cache
    cache = session.read(reply, cache, own=5).cache
    session.read(torch.cat([reply[:, -1:] * 0 + 1, question], 1), cache, own=1)
    kept = session.close()[0].position.tolist()
    # position 5 was followed by the reply, 10 by its end
    assert kept == [0, 1, 2, 3, 4, 11, 12, 13, 14]
    silent = read_session(model, prompt, 4)[0]
    assert (session.sums.alpha - silent.sums.alpha).abs().max() > 1e-3


def test_factors_do_not_depend_on_what_is_stored(model):
    tokens = some_tokens(model, 1, 20)
    runs = []
    for plastic in (None, 10 * some_memory(model)):
        session = SessionMemory(model, 1, 8, threshold=0.0)
        thought = session.read(tokens, Cache(), plastic)
        runs.append((thought, lived(session)))
    off, on = runs[0][0], runs[1][0]
    assert not torch.allclose(off.hidden[:, -1:], on.hidden)
    same(off.hidden[:, -1:], on.unaided.hidden)
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1]))


def test_an_engram_points_to_what_came_and_away_from_what_was_expected_as_long_as_its_reward(model):
    chance = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, model.backbone.config.hidden_size, generator=chance)
    reward, came = torch.rand(6, generator=chance) + 0.1, torch.arange(6)
    found = engrams(model, hidden, came, reward)
    same(found.norm(dim=1), model.ctm.log_eta.exp() * reward)
    embedding, gain = model.backbone.embed_tokens.weight, model.backbone.norm.weight
    for h, token, value in zip(hidden, came, found):
        expected = sum(p * e for p, e in zip(model.head(h).softmax(-1), embedding))
        toward = model.ctm.engram @ (gain * (embedding[token] - expected))
        same(value / value.norm(), toward / toward.norm())


def test_the_budget_keeps_the_strongest(model):
    session, factors = read_session(model, some_tokens(model, 1, 30), threshold=0.0, budget=7)
    _, everything = read_session(model, some_tokens(model, 1, 30), threshold=0.0)
    strength = everything[0].salience * everything[0].dopamine
    assert (len(factors[0].keys) == 7
            and factors[0].position.tolist() == sorted(strength.topk(7).indices.tolist()))


def test_what_was_expected_is_kept_only_where_what_is_salient_goes_on(model):
    tokens = some_tokens(model, 1, 30)
    (everything,) = read_session(model, tokens, chunk=8, threshold=0.0)[1]
    salient, surprising = everything.salience.median(), everything.surprise.median()
    (found,) = read_session(model, tokens, chunk=8, threshold=float(salient),
                            expected=float(surprising))[1]
    marked, news = everything.salience > salient, everything.surprise >= surprising
    goes_on = torch.cat([marked[1:], torch.tensor([False])])
    assert all((marked & ~news & x).any() for x in (goes_on, ~goes_on))
    same(found.keys, everything.keys[marked & (news | goes_on)])


# -----------------------------------------------------------------------------
# invariant 7: the write

@pytest.mark.parametrize("fade", [1.0, 0.5, 0.0])
def test_the_write_is_the_projected_delta_rule(model, fade):
    """Against the equations solved afresh for every token;
    and read as linear attention over the solved factors."""
    rule = WriteRule(n0=7.0, ridge=0.1, fade=fade, wide=torch.float64)
    ctm, (D, S) = model.ctm, model.ctm.c_proj.weight.shape
    sessions = [some_factors(model, 6, seed) for seed in range(40)] # lets rounding grow, if it can
    single = dataclasses.replace(rule, wide=torch.float32)
    plastic, rough = Plastic.blank(ctm, rule), Plastic.blank(ctm, single)
    for factors in sessions:
        plastic = compact_memory(ctm, plastic, factors, rule)
        rough = compact_memory(ctm, rough, factors, single)
    shared, rest = ctm.shared()
    common = rule.n0 * (shared.T @ shared + rest.diag())
    W, solved, past = torch.zeros(D, len(rest), dtype=torch.float64), [], torch.zeros_like(common)
    for factors in sessions:
        past = rule.fade * past
        for k, v in zip(addresses(ctm, factors).double(), factors.values.double()):
            along = torch.linalg.solve(
                common + rule.ridge * torch.eye(len(rest), dtype=torch.float64) + past, k)
            solved.append((along / (k @ along), v - W @ k))
            W += torch.outer(solved[-1][1], solved[-1][0])
            past += torch.outer(k, k)
    assert (W - plastic.weight).abs().max() < 1e-8
    assert (W - rough.weight).abs().max() < 1e-5 * W.abs().max()
    read = ctm.features(model(some_tokens(model, 1, 9)).keys.double() / S ** 0.5)
    attended = sum((read @ k)[..., None] * v for k, v in solved)
    assert (attended - read @ plastic.weight.T).abs().max() < 1e-8


def test_a_written_key_answers_a_repeated_one_adds_nothing_and_a_changed_one_replaces(model):
    facts, rule = some_factors(model, 5), WriteRule(n0=0.0, ridge=1e-6, wide=torch.float64)
    read = addresses(model.ctm, facts).double()
    once = compact_memory(model.ctm, Plastic.blank(model.ctm, rule), facts, rule)
    assert (read @ once.weight.T - facts.values).abs().max() < 1e-3
    twice = compact_memory(model.ctm, once, facts, rule)
    assert (twice.weight - once.weight).abs().max() < 1e-3
    changed = compact_memory(model.ctm, once, facts._replace(values=-facts.values), rule)
    assert (read @ changed.weight.T + facts.values).abs().max() < 1e-2


def again(model, old: Factors, seed: int, of: int = 1) -> Factors:
    """A session that has the first keys of an old one, a little otherwise, and values of its own.
    """
    new = some_factors(model, len(old.keys), seed)
    near = torch.nn.functional.normalize(old.keys[:of] + 0.01 * new.keys[:of], dim=1)
    return new._replace(keys=torch.cat([near, new.keys[of:]]))


def test_what_a_later_session_tells_anew_is_left_out_and_nothing_else(model):
    rule, ctm = WriteRule(near=0.98), model.ctm
    first, other = some_factors(model, 6, 1), some_factors(model, 6, 2)
    twice = first._replace(keys=torch.cat([first.keys[:1], first.keys[:5]]))    # in one session
    later = again(model, first, 3, of=2)
    pointing = [bearings(whitened(ctm, f)) for f in (twice, other, later)]
    gone = superseded(pointing, rule.near)
    assert [g.tolist() for g in gone] == [[True, True, True, False, False, False], [False] * 6,
                                          [False] * 6]
    assert all(map(torch.equal, superseded(pointing, rule.near, since=2), gone))
    assert [g.tolist() for g in superseded(pointing[::-1], rule.near)] == [
        [True, True] + 4 * [False], 6 * [False], 6 * [False]]
    both = compact_sessions(ctm, [first, other, later], rule)
    without = compact_sessions(ctm, [first.rows(torch.arange(2, 6)), other, later], rule)
    assert torch.equal(both.weight, without.weight)


@pytest.mark.parametrize("other", [{}, {"cap": 0.001}, {"project": False}, {"fade": 0.5},
                                   {"delta": False}])
def test_what_was_said_before_is_the_same_from_the_rows_and_from_the_weight(model, other):
    """Where W_m is what was said along each row, and where it is not."""
    rule = WriteRule(wide=torch.float64, **other)
    plastic = Plastic.blank(model.ctm, rule)
    for seed in range(6):
        factors = again(model, some_factors(model, 6, 0), seed)
        by_weight = compact_memory(model.ctm, dataclasses.replace(plastic, said=None), factors,
                                   rule)
        plastic = compact_memory(model.ctm, plastic, factors, rule)
        assert (plastic.weight - by_weight.weight).abs().max() < 1e-9 * plastic.weight.abs().max()
    assert (plastic.said is None) == bool({"cap", "project", "fade"} & set(other))


def test_caps_bound_the_write_and_keep_its_direction(model):
    exact = WriteRule(wide=torch.float64)
    free = compact_memory(model.ctm, Plastic.blank(model.ctm, exact), some_factors(model, 5), exact)
    for rule, measure in ((dataclasses.replace(exact, cap=0.001), output_change),
                          (dataclasses.replace(exact, norm_cap=0.01), norm_ratio)):
        bound = compact_memory(model.ctm, Plastic.blank(model.ctm, rule), some_factors(model, 5),
                               rule)
        assert measure(model.ctm, bound.weight) == pytest.approx(
            rule.cap if measure is output_change else rule.norm_cap, rel=1e-6)
        assert torch.cosine_similarity(bound.weight.flatten(), free.weight.flatten(),
                                       dim=0) > 1 - 1e-9


def test_memory_off_reads_nothing_that_belongs_to_the_memory(model):
    tokens = some_tokens(model, 2, 20)
    before = model(tokens)
    for name in ("salience_weight", "salience_bias", "engram", "log_eta", "key_moment",
                 "log_half_life", "mean_surprise", "session_proj"):
        getattr(model.ctm, name).data.fill_(float("nan"))
    after = model(tokens)
    assert (torch.equal(before.hidden, after.hidden)
            and torch.equal(before.certainty, after.certainty))


# -----------------------------------------------------------------------------
# the store

@pytest.fixture
def small():
    return randomised("grouped queries")


def commit(store: Store, seed: int, n: int = 4) -> dict:
    return store.commit(some_factors(store.model, n, seed), a_snapshot(store.model, seed), 20)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name != "lock"}


def test_forgetting_what_was_told_anew_brings_back_what_was_told_before(small, tmp_path):
    first = some_factors(small, 4, 1)
    with Store(tmp_path, small, rule=WriteRule(near=0.98), max_drift=math.inf) as store:
        told = store.commit(first, a_snapshot(small), 20)["id"]
        commit(store, 2)
        before = store.plastic()
        changed = store.commit(again(small, first, 3), a_snapshot(small, 3), 20)["id"]
        assert store.show(told)[2].tolist() == [True, False, False, False]
        assert not store.show(changed)[2].any() and not torch.equal(store.plastic(), before)
        store.forget(changed)
        assert torch.equal(store.plastic(), before) and not store.show(told)[2].any()


def test_what_is_loaded_equals_what_was_saved_and_a_forgotten_session_was_never_told(
        small, tmp_path):
    with (Store(tmp_path / "a", small, max_drift=math.inf) as a,
          Store(tmp_path / "b", small, max_drift=math.inf) as b):
        ids = [commit(a, seed)["id"] for seed in (1, 2, 3)]
        for seed in (1, 3):
            commit(b, seed)
        three = a.plastic()
        assert not torch.equal(three, b.plastic())
        a.forget(ids[1])
        assert torch.equal(a.plastic(), b.plastic())
        files = everything(tmp_path / "a")
        assert (files.keys() == everything(tmp_path / "b").keys()
                and not any(ids[1] in f for f in files))
    with Store(tmp_path / "a", small) as again:
        assert torch.equal(again.plastic(), b.plastic()) and all(
            torch.equal(x, y)
            for x, y in zip(again.factors[1], some_factors(small, 4, 3).rounded()))


def test_every_way_to_the_same_sessions_ends_in_the_same_bits(small, tmp_path, monkeypatch):
    """One by one, reopened half-way, imported at once, or with one between that was forgotten:
    blocks of 64 factors fall alike, also where the thirteenth and the seventeenth session tell anew
    what a whole block, and an open one, hold."""
    monkeypatch.setattr("memory.BLOCK", 64)
    sessions = [some_factors(small, 10, seed) for seed in range(51)]
    sessions[12], sessions[16] = (again(small, sessions[1], 12),
                                  again(small, sessions[15], 16, of=3))
    sessions[50] = again(small, sessions[2], 50)
    def commit_some(store, seeds) -> list[dict]:
        return [store.commit(sessions[seed], a_snapshot(small, seed), 12) for seed in seeds]
    with Store(tmp_path / "a", small, max_drift=math.inf) as a:
        commit_some(a, range(9))
    with Store(tmp_path / "a", small, max_drift=math.inf) as a:
        extra = commit_some(a, (50,))[0]
        commit_some(a, range(9, 17))
        a.forget(extra["id"])
        a.export(tmp_path / "all.safetensors")
        with (Store(tmp_path / "b", small, max_drift=math.inf) as b,
              Store(tmp_path / "c", small, max_drift=math.inf) as c):
            commit_some(b, range(17))
            c.import_from(tmp_path / "all.safetensors")
            assert torch.equal(a.plastic(), b.plastic()) and torch.equal(a.plastic(), c.plastic())
    one_by_one = compact_sessions(small.ctm, [f.rounded() for f in sessions[:17]])
    all_kept = compact_sessions(small.ctm, [f.rounded() for f in sessions[:17]],
                                WriteRule(near=math.inf))
    largest = one_by_one.weight.abs().max()                         # of fp32
    assert (a.plastic() - one_by_one.weight).abs().max() < 1e-5 * largest
    assert (a.plastic() - all_kept.weight).abs().max() > 1e-3


@pytest.mark.parametrize("loud", [1.0, 100.0])
def test_a_stored_key_points_where_it_pointed(loud):
    """Also where one channel is a hundred times as loud as the others."""
    keys = torch.randn(20, 512, generator=torch.Generator().manual_seed(0))
    keys[:, 3] *= loud
    factors = Factors(torch.nn.functional.normalize(keys, dim=1), torch.zeros(20, 8),
                      *[torch.zeros(20)] * 5)
    stored = factors.rounded()
    assert (factors.unit_keys() * stored.unit_keys()).sum(1).min() > (0.9997 if loud == 1 else 0.99)
    assert torch.equal(stored.rounded().keys, stored.keys)


def test_what_the_sessions_add_is_what_the_memory_says(small, tmp_path):
    with Store(tmp_path, small, max_drift=math.inf) as store:
        for seed in range(3):
            commit(store, seed)
        store.commit(again(small, some_factors(small, 4, 1), 3), a_snapshot(small, 3), 20)
        assert store.show(store.entries[1]["id"])[2].any()
        keys = torch.nn.functional.normalize(torch.randn(5, small.ctm.config.sync), dim=1)
        parts = store.told_by(keys)
        assert parts.shape == (4, 5, len(store.plastic())) and (
            parts.sum(0) - small.ctm.features(keys) @ store.plastic().T).abs().max() < 1e-4


def test_a_reader_takes_the_memory_as_it_was_written_and_computes_any_other(
        small, tmp_path, monkeypatch):
    with Store(tmp_path, small, max_drift=math.inf) as store:
        for seed in range(3):
            commit(store, seed)
        whole = store.plastic()

    def opened(**settings) -> torch.Tensor:
        return Store(tmp_path, small, read_only=True, **settings).plastic()
    with monkeypatch.context() as nothing:
        nothing.setattr(Store, "_written", lambda *_: pytest.fail("computed"))
        assert torch.equal(opened(), whole)
    assert not torch.equal(opened(rule=WriteRule(n0=1.0)), whole)
    file = tmp_path / "memory.safetensors"
    for blob in (file.read_bytes()[:-9], b"", file.read_bytes()[:-1] + b"?"):
        file.write_bytes(blob)
        assert torch.equal(opened(), whole)
    file.unlink()
    assert torch.equal(opened(), whole)


def test_a_crash_while_forgetting_leaves_nothing_of_it_and_loses_nothing_else(
        small, tmp_path, monkeypatch):
    with Store(tmp_path, small, max_drift=math.inf) as store:
        gone = commit(store, 1)["id"]
        commit(store, 2)
        before = (tmp_path / "memory.safetensors").read_bytes()
        with monkeypatch.context() as power:
            power.setattr(Path, "replace", lambda *_: 1 / 0)        # the next rename never comes
            with pytest.raises(ZeroDivisionError):
                store.forget(gone)
    assert before not in everything(tmp_path).values()
    with Store(tmp_path, small, max_drift=math.inf) as store:
        assert len(store.entries) == 2                              # the manifest is as it was
        store.forget(gone)
        alone = store.plastic()
    assert torch.equal(Store(tmp_path, small, read_only=True).plastic(), alone)


def test_what_text_costs_is_judged_against_the_memory_as_it_stands(small, tmp_path):
    def fresh() -> float:
        with Store(tmp_path, small, read_only=True) as reader:
            return round(reader.text.nats(reader.plastic()), 4)
    with Store(tmp_path, small, max_drift=math.inf) as store:
        first = commit(store, 1)
        for act in (lambda: None, lambda: store.forget(first["id"]), lambda: commit(store, 3)):
            act()
            before = fresh()
            assert commit(store, 2)["text_nats"] == [before, fresh()]


def test_keys_whitened_anew_leave_another_room(small):
    before = empty_projector(small.ctm, WriteRule()).free
    small.ctm.key_moment.mul_(2)
    assert torch.equal(empty_projector(small.ctm, WriteRule()).free, before)
    small.ctm.whiten()
    assert not torch.equal(empty_projector(small.ctm, WriteRule()).free, before)


def test_read_only_never_writes_a_byte_and_needs_no_lock(small, tmp_path):
    with Store(tmp_path, small, max_drift=math.inf) as store:
        commit(store, 1)
        before, written = everything(tmp_path), (tmp_path / "lock").stat().st_mtime_ns
        with Store(tmp_path, small, read_only=True) as reader:
            assert torch.equal(reader.plastic(), store.plastic())
            for change in (lambda: commit(reader, 2), lambda: reader.forget("all")):
                with pytest.raises(ValueError, match="open for writing"):
                    change()
        assert everything(tmp_path) == before and (tmp_path / "lock").stat().st_mtime_ns == written


def test_one_writer_at_a_time_and_it_is_named(small, tmp_path):
    with Store(tmp_path, small):
        with pytest.raises(ValueError, match=f"process {os.getpid()} writing"):
            Store(tmp_path, small)
    Store(tmp_path, small).close()


def test_a_refused_session_leaves_the_store_as_it_was(small, tmp_path):
    with Store(tmp_path, small, max_drift=math.inf) as store:
        commit(store, 1)
        before, plastic = everything(tmp_path), store.plastic()
        factors = some_factors(small, 3, 5)
        with pytest.raises(ValueError, match="finite session"):
            store.commit(factors._replace(values=factors.values / 0), a_snapshot(small), 9)
        with pytest.raises(ValueError, match="found an empty one"):
            store.commit(factors, a_snapshot(small), 0)
        store.max_drift = -100.0
        with pytest.raises(ValueError, match="cost ordinary text at most"):
            commit(store, 2)
        assert everything(tmp_path) == before and torch.equal(store.plastic(), plastic)


def test_files_that_no_manifest_names_are_removed_on_open(small, tmp_path):
    with Store(tmp_path, small, max_drift=math.inf) as store:
        commit(store, 1)
    before = everything(tmp_path)
    for orphan in ("sessions/half.safetensors", "snapshots/x", "manifest.json.new"):
        (tmp_path / orphan).write_bytes(b"half written")
    Store(tmp_path, small, read_only=True).close()
    assert len(everything(tmp_path)) == len(before) + 3             # a reader touches nothing
    Store(tmp_path, small).close()
    assert everything(tmp_path) == before


def test_a_store_that_died_before_its_first_manifest_opens_again(small, tmp_path):
    (tmp_path / "lock").write_text("1")
    (tmp_path / "manifest.json.new").write_bytes(b"half")
    with Store(tmp_path, small) as store:
        assert store.entries == [] and store.plastic() is None
    assert list(everything(tmp_path)) == ["manifest.json", "memory.safetensors"]


@pytest.mark.parametrize("sessions", [
    "[{}]", "[1]", "5", "{",
    '[{"id": "../x", "sha256": "", "snapshot_sha256": "", "told_at": 0, '
    '"tokens": 1, "factors": 1, "text_nats": [1, 2]}]'])
def test_an_import_that_lies_about_its_sessions_is_refused(small, tmp_path, sessions):
    with Store(tmp_path / "a", small, max_drift=math.inf) as store:
        commit(store, 1)
        before = everything(tmp_path / "a")
        save_file({"x": torch.zeros(1)}, tmp_path / "bad.safetensors",
                  {"format": "1", "base": store.base, "sessions": sessions})
        with pytest.raises(ValueError, match="expected the list of its sessions"):
            store.import_from(tmp_path / "bad.safetensors")
        assert everything(tmp_path / "a") == before


@pytest.mark.parametrize("kind", ["sessions", "snapshots", "manifest.json"])
def test_damage_is_named_in_one_line(small, tmp_path, kind):
    with Store(tmp_path, small, max_drift=math.inf) as store:
        commit(store, 1)
    path = next((tmp_path / kind).glob("*")) if (tmp_path / kind).is_dir() else tmp_path / kind
    whole = path.read_bytes()
    for broken in ((whole[:len(whole) // 2], whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
                   if kind != "manifest.json" else
                   (whole[:40], b"[]", whole.replace(b'"tokens": 20', b'"tokens": 21'),
                    whole + b" ")):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="expected .* found") as problem:
            with Store(tmp_path, small) as store:
                store.nearest(torch.zeros(64))
        assert "\n" not in str(problem.value) and path.read_bytes() == broken


def test_a_damaged_session_can_be_given_up_and_the_others_live_on(small, tmp_path):
    with (Store(tmp_path / "a", small, max_drift=math.inf) as a,
          Store(tmp_path / "b", small, max_drift=math.inf) as b):
        ids = [commit(a, seed)["id"] for seed in (1, 2)]
        commit(b, 2)
    (tmp_path / f"a/snapshots/{ids[0]}.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=f"--forget={ids[0]}"):
        Store(tmp_path / "a", small)
    with pytest.raises(ValueError, match="open for writing"):
        Store(tmp_path / "a", small, read_only=True, forget=ids[0])
    with Store(tmp_path / "a", small, forget=ids[0][:8]) as a:
        assert [e["id"] for e in a.dropped] == ids[:1] and torch.equal(a.plastic(), b.plastic())
    assert [e["id"] for e in Store(tmp_path / "a", small, read_only=True).entries] == ids[1:]
    assert not (tmp_path / f"a/snapshots/{ids[0]}.safetensors").exists()


def test_a_reader_begins_again_where_a_writer_has_gone_on(small, tmp_path, monkeypatch):
    """It had read the manifest, and then a session was forgotten."""
    with Store(tmp_path, small, max_drift=math.inf) as store:
        ids = [commit(store, seed)["id"] for seed in (1, 2)]
        outdated = [store._read_manifest()]
        store.forget(ids[0])
    now = Store._read_manifest
    monkeypatch.setattr(Store, "_read_manifest",
                        lambda store: outdated.pop() if outdated else now(store))
    assert [e["id"] for e in Store(tmp_path, small, read_only=True).entries] == ids[1:]
    assert not outdated


def test_foreign_stores_and_folders_are_refused(small, tmp_path):
    with Store(tmp_path / "a", small):
        pass
    with pytest.raises(ValueError, match="memory of these weights"):
        Store(tmp_path / "a", randomised("grouped queries", seed=1))
    (tmp_path / "b").mkdir()
    (tmp_path / "b/holiday.txt").write_text("sun")
    with pytest.raises(ValueError, match="found other files"):
        Store(tmp_path / "b", small)
    with pytest.raises(ValueError, match="found none"):
        Store(tmp_path / "c", small, read_only=True)
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    del manifest["sha256"]
    (tmp_path / "a/manifest.json").write_bytes(_sealed(manifest | {"format": 99}))
    with pytest.raises(ValueError, match="found 99"):
        Store(tmp_path / "a", small)


def full_disk(handle: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_sessions_travel_by_export_and_import(small, tmp_path, monkeypatch):
    with (Store(tmp_path / "a", small, max_drift=math.inf) as a,
          Store(tmp_path / "b", small, max_drift=math.inf) as b):
        ids = [commit(a, seed)["id"] for seed in (1, 2)]
        commit(b, 1)
        assert a.export(tmp_path / "all.safetensors") == 2
        assert b.import_from(tmp_path / "all.safetensors") == 1     # one was known
        assert torch.equal(a.plastic(), b.plastic()) and [e["id"] for e in b.entries] == ids
        before = everything(tmp_path / "b")
        whole = (tmp_path / "all.safetensors").read_bytes()
        for bad in (tmp_path / "a" / "manifest.json", tmp_path / "none" / "all.safetensors"):
            with pytest.raises(ValueError, match="outside"):
                a.export(bad)
        with monkeypatch.context() as m, pytest.raises(OSError):
            m.setattr(os, "fsync", full_disk)
            a.export(tmp_path / "all.safetensors")
        assert (tmp_path / "all.safetensors").read_bytes() == whole
        assert not (tmp_path / "all.safetensors.new").exists()
        damaged = (tmp_path / "all.safetensors").read_bytes()[:-200]
        (tmp_path / "damaged.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="whole safetensors file"):
            b.import_from(tmp_path / "damaged.safetensors")
        with pytest.raises(ValueError, match="id of a remembered session"):
            b.forget("nobody")
        assert everything(tmp_path / "b") == before
    with Store(tmp_path / "c", randomised("grouped queries", seed=1)) as c:
        with pytest.raises(ValueError, match="keys of another model"):
            c.import_from(tmp_path / "all.safetensors")


def test_the_nearest_snapshot_warms_a_session_and_age_fades_it(small, tmp_path):
    with Store(tmp_path, small, max_drift=math.inf) as store:
        for seed in (1, 2):
            commit(store, seed)
        wanted = a_snapshot(small, 2)
        for found, sums in zip(store.nearest(wanted.about), wanted):
            assert torch.allclose(found[0], sums)
        assert store.nearest(-wanted.about) is None
        store.entries[1]["told_at"] -= 365 * 86400
        assert store.nearest(wanted.about) is None
