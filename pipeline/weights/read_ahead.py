"""Work done ahead by a thread of its own: a file is read and hashed while its bytes are packed."""

import threading
from collections.abc import Generator, Iterator
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")

# So many items are under way at a time, with the one that is in use: enough that neither side waits
# for a moment of the other's.
PLACES = 4


class _End:
    """After the last item, with what ended them early if anything did."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def run_ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
    """The items, made by another thread while those before are in use.

    At most `PLACES` of them exist at a time: an item is over when the next is asked for, so they
    may take turns at so many buffers; at twice as many where these are items run ahead. Raises what
    making them raised. Whoever stops early closes the iterator: no more are made then.
    """
    made: SimpleQueue[Item | _End] = SimpleQueue()
    places = threading.Semaphore(PLACES)
    is_over = threading.Event()

    def make() -> None:
        try:
            while True:
                places.acquire()
                if is_over.is_set():
                    return
                made.put(next(items))
        except StopIteration:
            made.put(_End(None))
        except BaseException as error:  # it is raised where the items are used
            made.put(_End(error))

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while not isinstance(item := made.get(), _End):
            yield item
            places.release()
        if item.error is not None:
            raise item.error
    finally:
        is_over.set()
        places.release()
        thread.join()
