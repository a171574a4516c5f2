"""One store for finished work: whatever a stage has computed is computed once, however often it is killed.

A file of JSON lines. Each line holds the entries that were finished together, so that these are either all there or not
at all, and what a killed process was writing is a line without an end, which is passed over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

from tenfold.errors import DataError

Item = TypeVar("Item")
Tell = Callable[[int, int], None]
_BEGINS = '{"store": {'


class Store:
    """Finished work by key.

    Args:
        path: of the file, made at the first entry. None keeps entries in memory alone.

    A key names everything that decides its value beside what decides the file's place: a stage's own store lies in its
    working folder, which starts empty whenever anything that the stage depends on has changed.

    >>> store = Store(None)
    >>> store.get("sum", lambda: 1 + 1), store.get("sum", lambda: 1 / 0)
    (2, 2)
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._found: dict[str, Any] | None = None

    def get(self, key: str, compute: Callable[[], Any], of: Any = Any) -> Any:
        """The value of a key: read back, or computed and kept.

        Args:
            key: names the work.
            compute: does it; its result must have a form in JSON, as records and lists of them have.
            of: the type to read it back as, such as ``list[Result]``.

        Returns:
            The value as it is read back, also the first time, so that a resumed run sees no difference.

        Raises:
            DataError: the file is not a store.
        """
        if key not in self.entries:
            self.add({key: compute()})
        return TypeAdapter(of).validate_python(self.entries[key])

    def map(
        self,
        items: Mapping[str, Item],
        work: Callable[[Item], Any],
        *,
        of: Any = Any,
        workers: int = 1,
        tell: Tell = lambda done, total: None,
    ) -> dict[str, Any]:
        """The value of each item, by its key; what is finished is kept when another one fails.

        Args:
            items: what to work on, by keys as for `get`.
            work: of one item. With several workers a function of a module, because it is sent to other processes.
            of: the type of a value.
            workers: processes; 1 works in this one.
            tell: called with how many are done, and how many there are.

        Raises:
            DataError: the file is not a store.
            Exception: the first that ``work`` raised, once those at work have ended.

        >>> Store(None).map({"two": 2, "three": 3}, lambda number: number**2)
        {'two': 4, 'three': 9}
        """
        missing = {key: item for key, item in items.items() if key not in self.entries}
        done = len(items) - len(missing)
        for key, value in _worked(missing, work, workers):
            self.add({key: value})
            done += 1
            tell(done, len(items))
        adapter = TypeAdapter(of)
        return {key: adapter.validate_python(self.entries[key]) for key in items}

    def add(self, entries: Mapping[str, Any]) -> None:
        """Keep finished entries, all or none of them."""
        new = to_jsonable_python(dict(entries), inf_nan_mode="constants")
        known = self.entries
        if self.path is not None and new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"store": new}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        known.update(new)

    @property
    def entries(self) -> dict[str, Any]:
        """All that is kept, as plain values."""
        if self._found is None:
            self._found = {} if self.path is None or not self.path.exists() else _read(self.path)
        return self._found


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    torn = False
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            torn = not line.endswith("\n")
            try:
                found.update(json.loads(line)["store"])
            except json.JSONDecodeError:
                # What a killed process was writing is the beginning of a line; anything else is of no store.
                if not line.startswith(_BEGINS[: len(line.rstrip())]):
                    raise _no_store(path, number) from None
            except (ValueError, TypeError, KeyError):
                raise _no_store(path, number) from None
    if torn:
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
    return found


def _no_store(path: Path, number: int) -> DataError:
    return DataError(f"{path}, line {number}: not written by a run", remedy="remove the file, or name another one")


def _worked(items: Mapping[str, Item], work: Callable[[Item], Any], workers: int) -> Iterator[tuple[str, Any]]:
    """Values as they are finished."""
    if workers <= 1 or len(items) <= 1:
        for key, item in items.items():
            yield key, work(item)
        return
    # Not forked: threads of torch and tokenizers do not survive that.
    with ProcessPoolExecutor(min(workers, len(items)), mp_context=get_context("spawn")) as pool:
        futures: dict[Future[Any], str] = {pool.submit(work, item): key for key, item in items.items()}
        failed: BaseException | None = None
        try:
            for future in as_completed(futures):
                if error := future.exception():
                    failed = failed or error
                    for other in futures:
                        other.cancel()
                elif not future.cancelled():
                    yield futures[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        if failed is not None:
            raise failed
