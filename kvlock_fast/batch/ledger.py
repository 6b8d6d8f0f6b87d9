"""Ledger of a batch: a SQLite file in the output folder that says what became of each job.

A job is a row. Its state goes from pending to running to done or failed; what a killed program left running is pending
again at the next start. A result counts once its row says done, which is written after its files are whole.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvlock_fast.batch.jobs import Decision, Job, Pass, grouped, ranks
from kvlock_fast.batch.migrate import migrate_spec
from kvlock_fast.batch.places import LEDGER, held
from kvlock_fast.errors import InputError, OutputError, OutputLost, os_errors

if TYPE_CHECKING:
    from kvlock_fast.batch.worker import Outcome

STATES = ("pending", "running", "done", "failed")
MOST_CRASHES = 3
"""Number of deaths of a worker with a job after which the job is set aside."""
_VERSION = 3
_TABLES = """
CREATE TABLE IF NOT EXISTS passes (
    id INTEGER PRIMARY KEY, width INTEGER NOT NULL, tier TEXT, format TEXT, at_once INTEGER, ladder INTEGER
);
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, position INTEGER NOT NULL, spec TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'running', 'done', 'failed')),
    tries INTEGER NOT NULL DEFAULT 0, crashes INTEGER NOT NULL DEFAULT 0, commits INTEGER NOT NULL DEFAULT 0,
    seconds REAL, metrics TEXT, error TEXT, bytes INTEGER, report TEXT, thumbnail BLOB, finished REAL,
    pass INTEGER REFERENCES passes (id), place INTEGER
);
CREATE INDEX IF NOT EXISTS jobs_by_pass ON jobs (pass, place);
"""


@dataclass(frozen=True)
class Changes:
    """Counts of a manifest's jobs that are new, that read otherwise than before, and whose result is gone."""

    new: int
    changed: int
    gone: int


class Ledger(AbstractContextManager["Ledger"]):
    """The ledger of a folder, for one program at a time. Raises InputError where it is held or cannot be written."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / LEDGER
        self._lock = held(Path(folder), f"another batch is running in '{folder}'")
        try:
            self.db = sqlite3.connect(self.path, isolation_level=None)
            self.db.row_factory = sqlite3.Row
            self.db.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;")
            self._check_version()
            self.db.executescript(_TABLES)
        except BaseException as error:
            if hasattr(self, "db"):
                self.db.close()
            self._lock.release()
            if isinstance(error, sqlite3.Error):
                raise OutputError(f"the ledger '{self.path}' cannot be used: {error}") from error
            raise

    def close(self, *_: object) -> None:
        self.db.close()
        self._lock.release()

    __exit__ = close

    def check_there(self) -> None:
        """Raise OutputLost where the file was removed: what is written to it then is lost."""
        with os_errors(f"the ledger '{self.path}' cannot be written", OutputLost):
            if not self.path.exists():
                raise OutputLost(f"the ledger '{self.path}' was removed")

    def _check_version(self) -> None:
        version = self.db.execute("PRAGMA user_version").fetchone()[0]
        if version not in range(_VERSION + 1):
            raise InputError(f"the ledger '{self.path}' is of version {version}, and this program reads {_VERSION}")
        if version in (1, 2):
            self._rename_fields()
        self.db.execute(f"PRAGMA user_version = {_VERSION}")

    def _rename_fields(self) -> None:
        """Rewrite the jobs of an older ledger under today's names, so that what is done stays done."""
        with self._transaction() as db:
            for row in db.execute("SELECT id, spec FROM jobs").fetchall():
                try:
                    spec = migrate_spec(row["spec"])
                except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
                    raise InputError(f"the ledger '{self.path}' is damaged: job {row['id']!r}: {error}") from error
                db.execute("UPDATE jobs SET spec = ? WHERE id = ?", (spec, row["id"]))
            db.execute(f"PRAGMA user_version = {_VERSION}")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self.db.execute("BEGIN IMMEDIATE")
            yield self.db
            self.db.execute("COMMIT")
        except BaseException as error:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise OutputLost(f"the ledger '{self.path}' cannot be written: {error}") from error
            raise

    def take(
        self,
        jobs: Iterable[Job],
        size_of: Callable[[str], int | None],
        retry_failed: bool = False,
        overwrite: bool = True,
    ) -> Changes:
        """Enter the jobs of a manifest; what is not done is pending afterwards, but for what failed.

        Args:
            jobs: all of the manifest's.
            size_of: bytes of an output's file, None where there is none. A job whose result is not as it was left is
                pending again.
            retry_failed: what failed is pending again too.
            overwrite: results may replace files that are not of this ledger; if not, InputError names them, and
                nothing is entered.
        """
        new = changed = gone = 0
        others: list[str] = []
        with self._transaction() as db:
            db.execute("UPDATE jobs SET state = 'pending' WHERE state = 'running'")
            known = {row["id"]: row for row in db.execute("SELECT id, spec, state, bytes FROM jobs")}
            for position, job in enumerate(jobs):
                row, spec = known.get(job.id), job.spec()
                if not overwrite and (row is None or json.loads(row["spec"]).get("output") != job.output):
                    others += [job.output] if size_of(job.output) is not None else []
                if row is None:
                    new += 1
                    db.execute("INSERT INTO jobs (id, position, spec) VALUES (?, ?, ?)", (job.id, position, spec))
                    continue
                db.execute("UPDATE jobs SET position = ? WHERE id = ?", (position, job.id))
                if row["spec"] != spec:
                    changed += 1
                    _forget(db, job.id)
                    db.execute("UPDATE jobs SET spec = ?, pass = NULL, place = NULL WHERE id = ?", (spec, job.id))
                elif row["state"] == "done" and size_of(job.output) != row["bytes"]:
                    gone += 1
                    _forget(db, job.id)
                elif row["state"] == "failed" and retry_failed:
                    _forget(db, job.id)
            if others:
                more = f" and {len(others) - 1} more" if len(others) > 1 else ""
                raise InputError(
                    f"the result {others[0]!r}{more} would replace a file that no batch here made: --overwrite"
                )
        return Changes(new, changed, gone)

    def passes(self, ids: Iterable[str], most: int) -> list[Pass]:
        """The passes that lack a result of these jobs, those that an interruption met last; new ones as needed.

        most: jobs in a new pass.
        """
        wanted = set(ids)
        rows = self.db.execute("SELECT id, spec, pass FROM jobs WHERE state = 'pending' ORDER BY position")
        pending = [row for row in rows if row["id"] in wanted]
        homeless = [Job.from_spec(row["spec"]) for row in pending if row["pass"] is None]
        with self._transaction():
            for together in grouped(homeless, most):
                self._new_pass(together)
        numbers = dict.fromkeys(self._value("pass", row["id"]) for row in pending)
        found = [self.find_pass(number, wanted) for number in numbers]
        tried = {row["id"] for row in self.db.execute("SELECT id FROM jobs WHERE tries > 0")}
        rank = ranks(work.setup for work in found)
        return sorted(found, key=lambda work: (work.jobs[0].id in tried, rank[work.setup]))

    def find_pass(self, number: int, wanted: Iterable[str] | None = None) -> Pass:
        """A pass by its number, with what is pending in it."""
        head = self.db.execute("SELECT width, tier, format, at_once, ladder FROM passes WHERE id = ?", (number,))
        width, tier, format, at_once, ladder = head.fetchone()
        rows = self.db.execute("SELECT id, spec, state, place, crashes FROM jobs WHERE pass = ?", (number,)).fetchall()
        places: list[Job | None] = [None] * width
        for row in rows:
            places[row["place"]] = Job.from_spec(row["spec"])
        missing = {row["id"] for row in rows if row["state"] == "pending"}
        missing = missing if wanted is None else missing.intersection(wanted)
        decision = None if tier is None else Decision(tier, format, at_once, bool(ladder))
        crashes = max((row["crashes"] for row in rows if row["id"] in missing), default=0)
        return Pass(number, tuple(places), frozenset(missing), decision, crashes)

    def begin(self, work: Pass) -> None:
        """Enter a pass's jobs as running."""
        with self._transaction() as db:
            db.executemany("UPDATE jobs SET state = 'running', tries = tries + 1 WHERE id = ?", _ids(work.jobs))

    def done(self, outcome: Outcome, decision: Decision, report: str | None = None) -> None:
        """Enter a job whose files are whole; nothing changes if it was done already.

        decision: how its pass was run; report: the page's name below the results.
        """
        # JSON has no infinity: a PSNR that is infinite becomes None.
        finite = {name: x if x is None or isfinite(x) else None for name, x in (outcome.metrics or {}).items()}
        result = (outcome.seconds, json.dumps(finite), len(outcome.video), report, outcome.thumbnail, time.time())
        with self._transaction() as db:
            db.execute(
                "UPDATE jobs SET state = 'done', seconds = ?, metrics = ?, bytes = ?, report = ?, thumbnail = ?, "
                "finished = ?, error = NULL, commits = commits + 1 WHERE id = ? AND state != 'done'",
                (*result, outcome.job.id),
            )
            db.execute(
                "UPDATE passes SET tier = ?, format = ?, at_once = ?, ladder = ? "
                "WHERE tier IS NULL AND id = (SELECT pass FROM jobs WHERE id = ?)",
                (decision.tier, decision.format, decision.at_once, int(decision.ladder), outcome.job.id),
            )

    def failed(self, job: Job, error: str) -> None:
        """Enter why a job came to nothing."""
        with self._transaction() as db:
            db.execute(
                "UPDATE jobs SET state = 'failed', error = ?, finished = ? WHERE id = ? AND state != 'done'",
                (error, time.time(), job.id),
            )

    def stopped(self, work: Pass) -> list[Job]:
        """Put an interrupted pass's running jobs back to pending; the jobs of it that are pending then."""
        with self._transaction() as db:
            db.executemany("UPDATE jobs SET state = 'pending' WHERE id = ? AND state = 'running'", _ids(work.jobs))
        return [job for job in work.jobs if self._value("state", job.id) == "pending"]

    def crashed(self, work: Pass, reason: str) -> list[Pass]:
        """Enter that a worker died with a pass: its jobs are pending, or set aside after three times.

        Returns the passes to run for them. After the second time each job gets a pass of its own, so that the third
        time only the guilty one is hit.
        """
        left = self.stopped(work)
        with self._transaction() as db:
            db.executemany("UPDATE jobs SET crashes = crashes + 1 WHERE id = ?", _ids(left))
        again = []
        for job in left:
            crashes = self._value("crashes", job.id)
            if crashes >= MOST_CRASHES:
                self.failed(job, f"set aside: {reason} {crashes} times while it ran")
            else:
                again.append(job)
        if len(again) > 1 and work.crashes + 1 >= MOST_CRASHES - 1:
            return self._apart([[job] for job in again])
        return [self.find_pass(self._value("pass", job.id)) for job in again[:1]]

    def halved(self, work: Pass) -> list[Pass]:
        """Make two new passes of its missing jobs: what fails together is told apart."""
        jobs = self.stopped(work)
        middle = (len(jobs) + 1) // 2
        return self._apart([part for part in (jobs[:middle], jobs[middle:]) if part])

    def _apart(self, parts: list[list[Job]]) -> list[Pass]:
        """A new pass for each list of jobs."""
        with self._transaction():
            numbers = [self._new_pass(part) for part in parts]
        return [self.find_pass(number) for number in numbers]

    def counts(self, ids: Iterable[str]) -> dict[str, int]:
        """Count these jobs by state."""
        states = dict(self.db.execute("SELECT id, state FROM jobs").fetchall())
        found = Counter(states[id] for id in ids)
        return {state: found[state] for state in STATES}

    def rows(self) -> list[sqlite3.Row]:
        """List all jobs, in the manifest's order."""
        return self.db.execute("SELECT * FROM jobs ORDER BY position, id").fetchall()

    def _value(self, column: str, id: str) -> Any:
        return self.db.execute(f"SELECT {column} FROM jobs WHERE id = ?", (id,)).fetchone()[0]

    def _new_pass(self, jobs: list[Job]) -> int:
        number = self.db.execute("INSERT INTO passes (width) VALUES (?)", (len(jobs),)).lastrowid
        assert number is not None
        places = [(number, place, job.id) for place, job in enumerate(jobs)]
        self.db.executemany("UPDATE jobs SET pass = ?, place = ? WHERE id = ?", places)
        return number


def _ids(jobs: Iterable[Job]) -> list[tuple[str]]:
    return [(job.id,) for job in jobs]


def _forget(db: sqlite3.Connection, id: str) -> None:
    db.execute(
        "UPDATE jobs SET state = 'pending', crashes = 0, error = NULL, seconds = NULL, metrics = NULL, bytes = NULL, "
        "report = NULL, thumbnail = NULL, finished = NULL WHERE id = ?",
        (id,),
    )
