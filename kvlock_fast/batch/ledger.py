"""What became of each job: a SQLite file in the output folder, the one truth about a batch.

A job is a row. Its state goes from pending to running to done or failed; what a killed program left running is pending
again at the next start. A result counts once its row says done, which is written after its files are whole.
"""

import errno
import json
import math
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from kvlock_fast.batch.jobs import Decision, Job, Pass, grouped, ranks
from kvlock_fast.batch.migrate import migrate_spec
from kvlock_fast.errors import InputError, OutputError, OutputLost, warn

NAME = "ledger.sqlite"
STATES = ("pending", "running", "done", "failed")
MOST_CRASHES = 3
"""How often a worker may die with a job before the job is set aside."""
_VERSION = 2
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
    """What a manifest brings: jobs that are new, that read otherwise than before, and whose result is gone."""

    new: int
    changed: int
    gone: int


class Ledger:
    """One program at a time has a folder's ledger. Raises InputError where it is held or cannot be written."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / NAME
        self._lock = held(Path(folder), f"another batch is running in '{folder}'")
        try:
            self.db = sqlite3.connect(self.path, isolation_level=None)
            self.db.row_factory = sqlite3.Row
            self.db.execute("PRAGMA journal_mode = WAL")
            self.db.execute("PRAGMA synchronous = FULL")
            self._check_version()
            self.db.executescript(_TABLES)
        except BaseException as error:
            if hasattr(self, "db"):
                self.db.close()
            self._lock.close()
            if isinstance(error, sqlite3.Error):
                raise OutputError(f"the ledger '{self.path}' cannot be used: {error}") from error
            raise

    def close(self) -> None:
        self.db.close()
        self._lock.close()

    def check_there(self) -> None:
        """Raise OutputLost where the file was removed: what is written to it then is lost."""
        try:
            there = self.path.exists()
        except OSError as error:
            raise OutputLost(f"the ledger '{self.path}' cannot be written: {error.strerror or error}") from error
        if not there:
            raise OutputLost(f"the ledger '{self.path}' was removed")

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_version(self) -> None:
        version = self.db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, 1, _VERSION):
            raise InputError(f"the ledger '{self.path}' is of version {version}, and this program reads {_VERSION}")
        if version == 1:
            self._rename_fields()
        self.db.execute(f"PRAGMA user_version = {_VERSION}")

    def _rename_fields(self) -> None:
        """The jobs of a ledger of 0.1 under today's names, so that what is done stays done."""
        with self._transaction() as db:
            for row in db.execute("SELECT id, spec FROM jobs").fetchall():
                try:
                    spec = migrate_spec(row["spec"])
                except (ValueError, TypeError, AttributeError) as error:
                    raise InputError(f"the ledger '{self.path}' is damaged: job {row['id']!r}: {error}") from error
                db.execute("UPDATE jobs SET spec = ? WHERE id = ?", (spec, row["id"]))
            db.execute("PRAGMA user_version = 2")

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

        size_of(output): bytes of a result, None where there is none: a job whose result is not as it was left is
        pending again. retry_failed: so is what failed. overwrite: whether results may replace files that are not of
        this ledger; if not, InputError names them, and nothing is entered.
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
                self._new_pass([job.id for job in together])
        numbers = dict.fromkeys(self._pass_of(row["id"]) for row in pending)
        found = [self.find_pass(number, wanted) for number in numbers]
        tried = {row["id"] for row in self.db.execute("SELECT id FROM jobs WHERE tries > 0")}
        rank = ranks(work.setup for work in found)
        return sorted(found, key=lambda work: (work.jobs[0].id in tried, rank[work.setup]))

    def find_pass(self, number: int, wanted: Iterable[str] | None = None) -> Pass:
        """A pass by its number, with what is pending in it."""
        head = self.db.execute("SELECT * FROM passes WHERE id = ?", (number,)).fetchone()
        rows = self.db.execute("SELECT id, spec, state, place, crashes FROM jobs WHERE pass = ?", (number,)).fetchall()
        places: list[Job | None] = [None] * head["width"]
        for row in rows:
            places[row["place"]] = Job.from_spec(row["spec"])
        missing = {row["id"] for row in rows if row["state"] == "pending"}
        missing = missing if wanted is None else missing.intersection(wanted)
        decision = None
        if head["tier"] is not None:
            decision = Decision(head["tier"], head["format"], head["at_once"], bool(head["ladder"]))
        crashes = max((row["crashes"] for row in rows if row["id"] in missing), default=0)
        return Pass(number, tuple(places), frozenset(missing), decision, crashes)

    def begin(self, work: Pass) -> None:
        """Its jobs are running."""
        with self._transaction() as db:
            for job in work.jobs:
                db.execute("UPDATE jobs SET state = 'running', tries = tries + 1 WHERE id = ?", (job.id,))

    def done(self, job: Job, decision: Decision, **result: Any) -> bool:
        """Its files are whole. False if it was done already, in which case nothing changes.

        decision: how its pass was run; result: seconds, metrics, bytes, report, thumbnail.
        """
        metrics = json.dumps(_finite(result.get("metrics") or {}))
        values = (result["seconds"], metrics, result["bytes"], result.get("report"), result.get("thumbnail"))
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE jobs SET state = 'done', seconds = ?, metrics = ?, bytes = ?, report = ?, thumbnail = ?, "
                "finished = ?, error = NULL, commits = commits + 1 WHERE id = ? AND state != 'done'",
                (*values, time.time(), job.id),
            ).rowcount
            db.execute(
                "UPDATE passes SET tier = ?, format = ?, at_once = ?, ladder = ? "
                "WHERE tier IS NULL AND id = (SELECT pass FROM jobs WHERE id = ?)",
                (decision.tier, decision.format, decision.at_once, int(decision.ladder), job.id),
            )
        return changed == 1

    def failed(self, job: Job, error: str) -> None:
        """It came to nothing, and why."""
        with self._transaction() as db:
            db.execute(
                "UPDATE jobs SET state = 'failed', error = ?, finished = ? WHERE id = ? AND state != 'done'",
                (error, time.time(), job.id),
            )

    def stopped(self, work: Pass) -> None:
        """It was interrupted, and is pending."""
        with self._transaction() as db:
            for job in work.jobs:
                db.execute("UPDATE jobs SET state = 'pending' WHERE id = ? AND state = 'running'", (job.id,))

    def crashed(self, work: Pass, reason: str) -> list[Pass]:
        """A worker died with it. Its jobs are pending, or set aside after three times; the passes to run for them.

        After the second time each job gets a pass of its own, so that the third time only the guilty one is hit.
        """
        self.stopped(work)
        again = []
        with self._transaction() as db:
            for job in work.jobs:
                db.execute("UPDATE jobs SET crashes = crashes + 1 WHERE id = ? AND state = 'pending'", (job.id,))
        for job in work.jobs:
            if self.state(job.id) == "pending":
                crashes = self.db.execute("SELECT crashes FROM jobs WHERE id = ?", (job.id,)).fetchone()[0]
                if crashes >= MOST_CRASHES:
                    self.failed(job, f"set aside: {reason} {crashes} times while it ran")
                else:
                    again.append(job)
        if not again:
            return []
        if work.crashes + 1 < MOST_CRASHES - 1 or len(again) == 1:
            return [self.find_pass(self._pass_of(again[0].id))]
        return self.apart([[job] for job in again])

    def halved(self, work: Pass) -> list[Pass]:
        """Its missing jobs in two new passes: what fails together is told apart."""
        self.stopped(work)
        jobs = [job for job in work.jobs if self.state(job.id) == "pending"]
        middle = (len(jobs) + 1) // 2
        return self.apart([part for part in (jobs[:middle], jobs[middle:]) if part])

    def apart(self, parts: list[list[Job]]) -> list[Pass]:
        """A new pass for each list of jobs."""
        with self._transaction():
            numbers = [self._new_pass([job.id for job in part]) for part in parts]
        return [self.find_pass(number) for number in numbers]

    def state(self, id: str) -> str:
        return self.db.execute("SELECT state FROM jobs WHERE id = ?", (id,)).fetchone()[0]

    def counts(self, ids: Iterable[str]) -> dict[str, int]:
        """How many of these jobs are in each state."""
        states = dict(self.db.execute("SELECT id, state FROM jobs").fetchall())
        found = dict.fromkeys(STATES, 0)
        for id in ids:
            found[states[id]] += 1
        return found

    def rows(self) -> list[sqlite3.Row]:
        """All jobs, in the manifest's order."""
        return self.db.execute("SELECT * FROM jobs ORDER BY position, id").fetchall()

    def _pass_of(self, id: str) -> int:
        return self.db.execute("SELECT pass FROM jobs WHERE id = ?", (id,)).fetchone()[0]

    def _new_pass(self, ids: list[str]) -> int:
        number = self.db.execute("INSERT INTO passes (width) VALUES (?)", (len(ids),)).lastrowid
        places = [(number, place, id) for place, id in enumerate(ids)]
        self.db.executemany("UPDATE jobs SET pass = ?, place = ? WHERE id = ?", places)
        return number


def _forget(db: sqlite3.Connection, id: str) -> None:
    db.execute(
        "UPDATE jobs SET state = 'pending', crashes = 0, error = NULL, seconds = NULL, metrics = NULL, bytes = NULL, "
        "report = NULL, thumbnail = NULL, finished = NULL WHERE id = ?",
        (id,),
    )


def _finite(metrics: dict[str, float | None]) -> dict[str, float | None]:
    """None for a PSNR that is infinite: JSON has no such number."""
    return {name: value if value is None or math.isfinite(value) else None for name, value in metrics.items()}


def held(folder: Path, refusal: str) -> IO[str]:
    """The open lock file of a folder; the system lets it go when it is closed or the process ends, however it does.

    Raises InputError with the refusal where another process holds it, OutputError where it cannot be made.
    """
    try:
        file = (folder / ".ledger.lock").open("a")
    except OSError as error:
        raise OutputError(f"cannot write '{folder}': {error.strerror or error}") from error
    try:
        _hold(file)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            file.close()
            raise InputError(refusal) from error
        warn(f"'{folder}' has no file locks ({error.strerror or error}): let one batch at a time write there")
    return file


def _hold(file: Any) -> None:
    """Raises OSError if another process holds it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
