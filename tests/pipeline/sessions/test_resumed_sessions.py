"""A session goes on after its stages were restarted, with the text of a cold run, or is rebuilt."""

from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio

from pipeline.agreement.trust_policy import UserTrust
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation
from pipeline.engine.limits import Limits
from pipeline.errors import InputError, SessionInUse, StageLost, StoreError
from pipeline.kernels.kernel_selection import why_not_native
from pipeline.orchestrator.open_pipeline import PipelineOptions, open_pipeline
from pipeline.protocol.stored_state import Mark
from pipeline.protocol.time_limits import TimeLimits
from pipeline.sampling.params import SamplingParams
from pipeline.sessions.kv_store import StoreLimits
from pipeline.sessions.sealing import Place
from pipeline.sessions.session_book import SessionBook
from pipeline.sessions.session_keys import SessionKeys
from pipeline.sessions.sqlite_store import SqliteStore
from pipeline.sessions.stage_store import StageStore

SECRET = bytes(range(32))
FIRST = tuple(range(100, 164))
LIMITS = Limits(2, 256, chunk_tokens=16, num_stages=2)

pytestmark = pytest.mark.skipif(why_not_native() is not None, reason="native kernels are exact")


class Home:
    """The user's side, and stages that keep sessions in a directory."""

    def __init__(self, deployment, directory):
        self.deployment, self.directory = deployment, directory
        self.stores = []
        plain_setup = deployment.setup

        def setup(idx):
            made = plain_setup(idx)
            place = Place(
                b"", made.manifest.core_hash(), made.shard.layer_start, made.shard.layer_end,
                made.precision, made.shard.kernels.name,
            )  # fmt: skip
            store = SqliteStore(directory / f"stage{idx}", StoreLimits())
            self.stores.append(store)
            return replace(made, store=StageStore(store, place))

        deployment.setup = setup

    def book(self, secret=SECRET):
        core = self.deployment.planned.core_hash()
        return SessionBook(self.directory / "home", SessionKeys(secret), "tiny", core, 2)

    @asynccontextmanager
    async def engine(self, *, is_exact=True):
        deployment = self.deployment
        async with deployment.running() as (manifest, results):
            trust = UserTrust.create(manifest, deployment.identity, deployment.authority.root_cert)
            options = PipelineOptions(
                LIMITS, times=TimeLimits(connect_seconds=20), data_out_listen=results
            )
            engine = PipelineEngine(LIMITS)
            async with open_pipeline(manifest, trust, options, lambda _: None) as pipeline:
                engine.allow_reuse(is_exact and pipeline.is_row_exact)
                yield engine, pipeline
        for store in self.stores:
            store.close()
        self.stores.clear()

    async def turn(self, prompt_ids, stored=None, num_tokens=8, *, is_exact=True):
        """One request on stages started for it: its tokens, and how many were loaded."""
        with trio.fail_after(60):
            async with self.engine(is_exact=is_exact) as (engine, pipeline):
                heard = []
                ends, sampling = frozenset(), SamplingParams()
                generation = Generation(prompt_ids, num_tokens, ends, sampling, stored=stored)
                engine.submit(generation, heard.append)
                await engine.drain(pipeline)
        return tuple(output.token_id for output in heard), heard[0].num_cached


@pytest.fixture
def home(deployment, tmp_path):
    return Home(deployment, tmp_path)


async def test_a_second_turn_goes_on_from_what_was_stored_and_says_what_a_cold_one_says(home):
    tokens, num_loaded = await home.turn(FIRST, home.book().open("", "chat"))
    assert num_loaded == 0
    second = (*FIRST, *tokens, 7, 8, 9)
    found, num_loaded = await home.turn(second, home.book().open("", "chat"))
    assert num_loaded == len(FIRST) + len(tokens) - 1
    expected, _ = await home.turn(second)
    assert found == expected
    third = (*second, *found, 5)
    found, num_loaded = await home.turn(third, home.book().open("", "chat"))
    assert num_loaded == len(third) - 2
    assert found == (await home.turn(third))[0]


async def test_a_text_that_begins_otherwise_loads_what_is_alike(home):
    await home.turn(FIRST, home.book().open("", "chat"))
    other = (*FIRST[:40], 3, 2, 1)
    found, num_loaded = await home.turn(other, home.book().open("", "chat"))
    assert num_loaded == 40
    assert found == (await home.turn(other))[0]
    again, num_loaded = await home.turn((*other, *found, 4), home.book().open("", "chat"))
    assert num_loaded == len(other) + len(found) - 1
    assert again == (await home.turn((*other, *found, 4)))[0]


@pytest.mark.parametrize("stages", [(0,), (1,), (0, 1)], ids=str)
async def test_a_store_that_has_lost_a_stages_part_costs_time_and_no_more(home, stages, tmp_path):
    tokens, _ = await home.turn(FIRST, home.book().open("", "chat"))
    for idx in stages:
        (tmp_path / f"stage{idx}" / "sessions.sqlite3").unlink()
    second = (*FIRST, *tokens, 7)
    found, num_loaded = await home.turn(second, home.book().open("", "chat"))
    assert num_loaded == 0
    await home.turn(second, home.book().open("", "chat"))  # the very same text
    third = (*second, *found, 5)
    again, num_loaded = await home.turn(third, home.book().open("", "chat"))
    assert num_loaded == len(third) - 2
    assert again == (await home.turn(third))[0]


async def test_a_state_rolled_back_in_a_stages_store_is_not_used(home, tmp_path):
    path = tmp_path / "stage0" / "sessions.sqlite3"
    tokens, _ = await home.turn(FIRST, home.book().open("", "chat"))
    older = path.read_bytes()
    second = (*FIRST, *tokens, 7)
    tokens, _ = await home.turn(second, home.book().open("", "chat"))
    path.write_bytes(older)
    third = (*second, *tokens, 5)
    found, num_loaded = await home.turn(third, home.book().open("", "chat"))
    assert num_loaded == 0
    assert found == (await home.turn(third))[0]


async def test_a_store_that_fails_or_is_slow_costs_time_and_no_more(home, monkeypatch):
    async def fail(*_):
        raise StoreError("down")

    monkeypatch.setattr(StageStore, "save", fail)
    tokens, _ = await home.turn(FIRST, home.book().open("", "chat"))
    assert home.book().open("", "chat").record.token_ids == (*FIRST, *tokens)
    monkeypatch.undo()
    second = (*FIRST, *tokens, 7)
    found, num_loaded = await home.turn(second, home.book().open("", "chat"))
    assert num_loaded == 0

    async def hang(*_):
        await trio.sleep_forever()

    monkeypatch.setattr(StageStore, "load", hang)
    monkeypatch.setattr("pipeline.stage.slot_storage.STORE_SECONDS", 0.2)
    third = (*second, *found, 5)
    again, num_loaded = await home.turn(third, home.book().open("", "chat"))
    assert num_loaded == 0
    assert again == (await home.turn(third))[0]


async def test_two_requests_of_one_session_at_once_are_answered_and_the_last_is_kept(home):
    sampling = SamplingParams()
    others = (FIRST, (*FIRST[:30], 9, 9))
    async with home.engine() as (engine, pipeline):
        heard = [[], []]
        for prompt_ids, each in zip(others, heard, strict=True):
            stored = home.book().open("", "chat")
            generation = Generation(prompt_ids, 8, frozenset(), sampling, stored=stored)
            engine.submit(generation, each.append)
        await engine.drain(pipeline)
    texts = [
        (*one, *(each.token_id for each in two)) for one, two in zip(others, heard, strict=True)
    ]
    for prompt_ids, text in zip(others, texts, strict=True):
        assert text == (*prompt_ids, *(await home.turn(prompt_ids))[0])
    kept = home.book().open("", "chat").record.token_ids
    assert kept in texts
    found, _ = await home.turn((*kept, 3), home.book().open("", "chat"))
    assert found == (await home.turn((*kept, 3)))[0]


async def test_what_home_and_stages_keep_holds_no_name_and_no_token(home, tmp_path):
    await home.turn(FIRST, home.book().open("", "../../a name"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} >= {"home", "stage0", "stage1"}
    assert not any(b"a name" in path.read_bytes() for path in files)
    (record,) = home.book().records()
    assert record.name == "../../a name"
    assert record.token_ids[: len(FIRST)] == FIRST


def test_a_session_that_another_client_has_is_refused_until_it_is_done(home):
    one, other = (home.book().open("", "chat") for _ in range(2))
    with one.locked():
        with pytest.raises(SessionInUse, match="session 'chat' is in use"), other.locked():
            pass
        with home.book().open("", "other").locked():
            pass
    with other.locked():
        pass


async def test_one_process_as_two_gives_a_session_to_one_request_at_a_time(home):
    book = home.book()
    async with book.open("", "chat").held():
        with pytest.raises(SessionInUse, match="is in use"):
            async with book.open("", "chat").held():
                pass
        other = home.book().open("", "chat")
        with pytest.raises(SessionInUse, match="is in use"), other.locked():
            pass
    async with book.open("", "chat").held():
        pass


class Unready:
    """Stages that save when they are let, or are lost."""

    def __init__(self, error=None):
        self.error, self.begun, self.may_end = error, trio.Event(), trio.Event()

    async def save(self, slot, end, stored):
        self.begun.set()
        if self.error is not None:
            raise self.error
        await self.may_end.wait()
        return [[Mark(end, b"r" * 32)]] * 2


async def test_a_request_waits_for_what_the_one_before_it_has_left_and_reads_it(home):
    book, stages = home.book(), Unready()
    before, after = book.open("", "chat"), book.open("", "chat")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(before.save, stages, 0, FIRST, 60)
        await stages.begun.wait()
        other = home.book().open("", "chat")  # as another process has it
        with pytest.raises(SessionInUse), other.locked():
            pass
        with trio.move_on_after(0.05) as scope:
            async with after.held():
                pass
        assert scope.cancelled_caught
        stages.may_end.set()
        async with after.held():
            assert after.stored_ids == FIRST[:60]


async def test_a_text_whose_stages_are_lost_while_it_is_saved_is_kept(home):
    with pytest.raises(StageLost):
        await home.book().open("", "chat").save(Unready(StageLost(1, "gone")), 0, FIRST, 60)
    stages = Unready()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(home.book().open("", "other").save, stages, 0, FIRST, 60)
        await stages.begun.wait()
        nursery.cancel_scope.cancel()
    for name in ("chat", "other"):
        session = home.book().open("", name)
        assert session.record.token_ids == FIRST
        assert session.stored_ids == ()


async def test_a_session_that_is_in_use_is_not_forgotten(home):
    book = home.book()
    session = book.open("", "chat")
    book.write(session.session_id, session.record)
    with session.locked(), pytest.raises(SessionInUse):
        home.book().forget("chat")
    assert home.book().forget("chat")


async def test_with_rows_that_are_not_exact_the_text_is_kept_and_computed_anew(home):
    for turn in range(2):
        stored = home.book().open("", "chat")
        prompt_ids = (*stored.record.token_ids, *FIRST[:20], turn)
        tokens, num_loaded = await home.turn(prompt_ids, stored, is_exact=False)
        assert num_loaded == 0
        record = home.book().open("", "chat").record
        assert record.token_ids == (*prompt_ids, *tokens)
        assert record.num_stored == 0


def test_a_session_of_another_model_is_not_replaced(home):
    book = home.book()
    session = book.open("", "chat")
    book.write(session.session_id, replace(session.record, model="other"))
    with pytest.raises(InputError, match="'chat' is of another model, other"):
        book.open("", "chat")
    assert book.forget("chat")


def test_records_are_listed_past_one_that_cannot_be_read(home, tmp_path):
    book = home.book()
    for name in "abc":
        session = book.open("", name)
        book.write(session.session_id, session.record)
    first, *_ = sorted((tmp_path / "home").glob("*.session"))
    first.write_text("nothing")
    error, *records = book.records()
    assert str(first) in str(error)
    assert len(records) == 2


def test_a_record_of_another_secret_or_damaged_is_one_clear_error(home, tmp_path):
    book = home.book()
    session = book.open("", "chat")
    book.write(session.session_id, session.record)
    (path,) = (tmp_path / "home").glob("*.session")
    assert path.stat().st_mode & 0o777 == 0o600
    assert home.book(SECRET[::-1]).open("", "chat").stored_ids == ()
    path.write_text(path.read_text()[:-8])
    with pytest.raises(InputError, match="is damaged, or of another secret"):
        book.open("", "chat")
    assert book.forget("chat")
    assert not book.forget("chat")
    assert book.open("", "chat").stored_ids == ()
