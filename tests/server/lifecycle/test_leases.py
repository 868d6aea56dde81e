import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.lifecycle.leases import CHANGES, Leases

QA, JSON = "qa@3f2a91c0", "json@00000001"


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Leases]:
    leases = Leases(tmp_path)
    yield leases
    leases.close()


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Leases]:
    leases = Leases(tmp_path)
    yield leases
    leases.close()


def other_process(run_dir: Path, work: str) -> subprocess.Popen[str]:
    """Another API process, which says what it has done and then does nothing."""
    code = f"""
import sys, time
from pathlib import Path
from server.lifecycle.leases import Leases, CHANGES
leases = Leases(Path(sys.argv[1]))
{work}
print(leases.owner, flush=True)
time.sleep(1000)
"""
    command = [sys.executable, "-c", code, str(run_dir)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def killed(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_leases_of_all_processes_count(here: Leases, there: Leases) -> None:
    one, two = here.take([QA, JSON]), here.take([QA])
    three = there.take([QA])
    assert (here.count(QA), there.count(QA), here.count(JSON)) == (3, 3, 1)
    one.release()
    one.release()
    assert (here.count(QA), here.count(JSON)) == (2, 0)
    two.release()
    three.release()
    assert here.count(QA) == 0
    assert here.count("unheard of@00000000") == 0


def test_the_parts_of_a_request_count_once(here: Leases, there: Leases) -> None:
    route = here.take([QA])
    parts = [route.share(), route.share()]
    assert there.count(QA) == 1
    route.release()
    parts[0].release()
    parts[0].release()
    assert route.released and there.count(QA) == 1
    parts[1].release()
    assert there.count(QA) == 0


def test_room_is_used_again(here: Leases) -> None:
    kept = here.take([QA])
    for number in range(3000):
        here.take([f"network@{number:08x}"]).release()
    assert here.count(QA) == 1
    kept.release()


def test_a_version_is_drained_when_all_have_seen_it_and_none_holds_it(
    here: Leases, there: Leases
) -> None:
    with here.announcing() as epoch:
        assert here.epoch % 2 and not here.outdated and not there.outdated
    assert here.outdated and there.outdated
    held = there.take([QA])
    here.see(epoch)
    assert not here.outdated
    assert not here.drained(QA, epoch), "the other one may still give out leases"
    there.see(epoch)
    assert not here.drained(QA, epoch), "the other one holds a lease"
    held.release()
    assert here.drained(QA, epoch) and there.drained(QA, epoch)


def test_a_process_that_joins_has_seen_nothing(here: Leases, tmp_path: Path) -> None:
    with here.announcing() as epoch:
        pass
    here.see(epoch)
    newcomer = Leases(tmp_path)
    assert newcomer.outdated
    assert not here.drained(QA, epoch)
    newcomer.close()
    assert here.drained(QA, epoch)


def test_leases_die_with_their_process(here: Leases, tmp_path: Path) -> None:
    with here.announcing() as epoch:
        pass
    here.see(epoch)
    process = other_process(tmp_path, f"leases.see({epoch}); lease = leases.take(['{QA}'])")
    owner = heard(process)
    assert here.lives(owner) and here.lives(here.owner)
    assert here.count(QA) == 1
    assert not here.drained(QA, epoch)
    killed(process)
    assert not here.lives(owner)
    assert here.drained(QA, epoch)
    assert [file.name for file in tmp_path.glob("process-*")] == [here.owner]


def test_no_owner_outside_the_run_directory_is_asked_for(here: Leases) -> None:
    assert not here.lives("process-1-nobody")
    assert not here.lives("../../etc/passwd")


async def test_one_task_at_a_time_holds_a_lock(here: Leases, there: Leases) -> None:
    inside: list[str] = []

    async def work(leases: Leases, name: str) -> None:
        async with leases.locked(CHANGES):
            inside.append(name)
            assert len(inside) == 1
            await asyncio.sleep(0.02)
            inside.remove(name)

    tasks = [work(leases, f"{number}") for leases in (here, there) for number in range(4)]
    await asyncio.gather(*tasks)


async def test_a_lock_outlives_those_who_wait_for_it_and_not_its_holder(
    here: Leases, there: Leases
) -> None:
    """dynamo #10347: a lock was dropped while others waited on it."""
    holding, release = asyncio.Event(), asyncio.Event()
    entered: list[str] = []

    async def hold() -> None:
        async with here.locked(CHANGES):
            holding.set()
            await release.wait()

    async def wait(name: str) -> None:
        async with there.locked(CHANGES):
            entered.append(name)

    holder = asyncio.create_task(hold())
    await holding.wait()
    impatient, patient = (asyncio.create_task(wait(name)) for name in ("impatient", "patient"))
    await asyncio.sleep(0.05)
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    await asyncio.sleep(0.05)
    assert entered == [], "who gave up waiting has freed the lock of another"
    holder.cancel()
    await patient
    assert entered == ["patient"]


async def test_a_holder_that_fails_frees_its_lock(here: Leases, there: Leases) -> None:
    with pytest.raises(RuntimeError):
        async with here.locked(CHANGES):
            raise RuntimeError
    async with there.locked(CHANGES):
        pass


async def test_a_change_whose_maker_was_killed_is_announced(
    here: Leases, there: Leases, tmp_path: Path
) -> None:
    work = """
import asyncio
async def change():
    async with leases.locked(CHANGES):
        with leases.announcing():
            print(leases.owner, flush=True)
            time.sleep(1000)
asyncio.run(change())
"""
    process = other_process(tmp_path, work)
    heard(process)
    here.announce_for_the_dead()
    assert here.epoch % 2, "its maker lives"
    assert not here.outdated
    killed(process)
    here.announce_for_the_dead()
    assert here.outdated and there.outdated
    async with here.locked(CHANGES):
        pass


async def test_a_change_after_one_that_was_cut_short_is_a_change_too(
    here: Leases, there: Leases
) -> None:
    with there.announcing() as before:
        pass
    there.see(before)
    there._epoch[0] += 1  # where its maker was killed
    async with here.locked(CHANGES):
        with here.announcing() as epoch:
            assert here.epoch % 2
            assert not there.outdated
        assert here.epoch == epoch
    assert there.outdated
    assert not here.drained(QA, epoch)


def test_files_are_private(here: Leases, tmp_path: Path) -> None:
    modes = {os.stat(file).st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes == {0o600}
