"""What stages are ordered to save and to load of a session, all of them alike."""

from collections.abc import Sequence
from itertools import count

from pipeline.errors import MessageError, StateRefused, StoreError
from pipeline.orchestrator.stage_watch import RemoteStage
from pipeline.protocol.messages import Load, Loaded, NotStored, Save, Saved
from pipeline.protocol.stored_state import Mark, StoredPart, StoredSlot
from pipeline.tasks import open_tasks


class SlotOrders:
    """Orders, numbered; what each stage answers, if it is not lost meanwhile."""

    def __init__(self) -> None:
        self._operations = count()

    async def save(
        self, stages: Sequence[RemoteStage], slot: int, end: int, stored: StoredSlot
    ) -> Sequence[Sequence[Mark]]:
        """Have all stages save a slot; each one's new marks. Raises StoreError or StageLost."""

        def order(part: StoredPart) -> Save:
            return Save(
                operation=next(self._operations),
                slot=slot,
                session=stored.session,
                key=part.key,
                epoch=stored.epoch,
                num_chunks=part.num_chunks,
                position=part.last.position,
                root=part.last.root,
                end=end,
            )

        marks = []
        for answer in await _carry_out(stages, [order(part) for part in stored.parts]):
            if not isinstance(answer, Saved) or len(answer.positions) != len(answer.roots):
                raise MessageError("a stage answered something else than a save")
            marks.append([Mark(*each) for each in zip(answer.positions, answer.roots, strict=True)])
        if len({tuple(mark.position for mark in each) for each in marks}) != 1:
            raise StoreError("stages have saved different positions")
        return marks

    async def load(
        self, stages: Sequence[RemoteStage], slot: int, length: int, stored: StoredSlot
    ) -> None:
        """Have all stages load a slot. Raises StateRefused, StoreError or StageLost."""

        def order(part: StoredPart) -> Load:
            return Load(
                operation=next(self._operations),
                slot=slot,
                session=stored.session,
                key=part.key,
                epoch=stored.epoch,
                num_chunks=part.num_chunks,
                position=part.last.position,
                root=part.last.root,
                length=length,
            )

        for answer in await _carry_out(stages, [order(part) for part in stored.parts]):
            if not isinstance(answer, Loaded):
                raise MessageError("a stage answered something else than a load")


async def _carry_out(
    stages: Sequence[RemoteStage], orders: Sequence[Save | Load]
) -> list[Saved | Loaded]:
    """What stages answer, once all have: one that fails leaves none at work on the slot.

    Raises StateRefused if any says that what is stored is void, else StoreError if any failed.
    """
    if len(stages) != len(orders):
        raise StoreError(f"a session of {len(orders)} stages, there are {len(stages)}")
    answers: dict[int, Saved | Loaded | NotStored] = {}

    async def ask(stage: RemoteStage, order: Save | Load) -> None:
        answers[stage.idx] = await stage.order(order)

    async with open_tasks() as tasks:
        for stage, order in zip(stages, orders, strict=True):
            tasks.start_soon(ask, stage, order)
    done = []
    failed = [each for each in answers.values() if isinstance(each, NotStored)]
    for each in sorted(failed, key=lambda answer: not answer.is_void):
        raise StateRefused(each.detail) if each.is_void else StoreError(each.detail)
    for stage in stages:
        answer = answers[stage.idx]
        assert not isinstance(answer, NotStored)  # as has been looked at
        done.append(answer)
    return done
