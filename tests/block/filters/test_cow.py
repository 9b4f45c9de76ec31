"""Changes stay in the overlay, the device below is as it was; commit() brings them down."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from homeloop.block.device import Device
from homeloop.block.file import File
from homeloop.block.filters.cow import Cow
from homeloop.block.filters.readonly import Readonly
from homeloop.block.memory import Memory
from homeloop.errors import BlockError, UsageError
from tests.block.answers import finish, is_inline, turns
from tests.block.filters.waiting import Waiting

CLUSTER = 4096
SIZE = 8 * CLUSTER + 512        # the last cluster is a short one


def filled(byte: bytes = b"b") -> Memory:
    memory = Memory(SIZE)
    memory.write(0, byte * SIZE)
    return memory


def test_a_part_of_a_cluster_brings_the_rest_along() -> None:
    base = Memory(SIZE)
    base.write(0, bytes(i & 0xFF for i in range(SIZE)))
    before = bytes(base.read(0, SIZE))
    cow = Cow(Readonly(base), cluster=CLUSTER)
    device = Device(cow)
    assert device.can_write
    device.write(CLUSTER - 2, b"over")
    assert cow.clusters == 2
    device.write(SIZE - 1, b"!")
    wanted = bytearray(before)
    wanted[CLUSTER - 2 : CLUSTER + 2] = b"over"
    wanted[-1:] = b"!"
    assert bytes(device.read(0, SIZE)) == wanted                # type: ignore[arg-type]
    assert bytes(base.read(0, SIZE)) == before
    assert device.statistics().waited == 0


def test_extents_are_of_both_layers() -> None:
    base = Memory(1 << 20)
    base.write(1 << 18, b"b" * (1 << 17))
    device = Device(Cow(base))
    device.write(0, b"x" * 65536)
    device.write_zeroes(1 << 18, 1 << 16)
    assert device.extents(0, 1 << 20) == [
        (1 << 16, False, False),
        (4 << 16, True, True),          # nobody's; the last of them zeroes over data of the base
        (1 << 16, False, False),        # of the base
        (10 << 16, True, True),
    ]


def test_trim_is_of_whole_clusters() -> None:
    base = filled()
    device = Device(Cow(base, cluster=CLUSTER))
    device.trim(100, 3 * CLUSTER)
    device.trim(SIZE - 600, 600)                                # the short one at the end is whole, too
    wanted = bytearray(b"b" * SIZE)
    wanted[CLUSTER : 3 * CLUSTER] = bytes(2 * CLUSTER)
    wanted[8 * CLUSTER :] = bytes(512)
    assert bytes(device.read(0, SIZE)) == wanted                # type: ignore[arg-type]
    assert bytes(base.read(0, SIZE)) == b"b" * SIZE


def test_commit_brings_all_down_and_gives_the_overlay_back() -> None:
    async def main() -> None:
        base, over = filled(), Memory(1 << 20)
        cow = Cow(base, overlay=over, cluster=CLUSTER)
        device = Device(cow)
        device.write(10, b"ten")
        device.write_zeroes(2 * CLUSTER, 2 * CLUSTER)
        wanted = bytes(device.read(0, SIZE))                    # type: ignore[arg-type]
        assert await cow.commit() == 3 * CLUSTER
        assert bytes(base.read(0, SIZE)) == wanted
        assert cow.clusters == 0
        assert over.read(0, SIZE) == bytes(SIZE)
        assert bytes(device.read(0, SIZE)) == wanted            # type: ignore[arg-type]
        assert await cow.commit() == 0
        device.write(10, b"new")                                # and it begins anew
        assert bytes(base.read(10, 3)) == b"ten"

    asyncio.run(main())


def test_commit_to_what_is_read_only() -> None:
    async def main() -> None:
        cow = Cow(Readonly(filled()), cluster=CLUSTER)
        device = Device(cow)
        device.write(10, b"ten")
        with pytest.raises(BlockError) as caught:
            await cow.commit()
        assert caught.value.errno == errno.EPERM
        assert device.read(10, 3) == b"ten"

    asyncio.run(main())


def test_commit_that_fails_keeps_what_is_not_down_and_the_flush_that_it_owes() -> None:
    async def main() -> None:
        base = Waiting(SIZE)
        cow = Cow(base, cluster=CLUSTER)
        device = Device(cow)
        await finish(device.write(0, b"a" * CLUSTER))
        await finish(device.write(4 * CLUSTER, b"b" * CLUSTER))
        base.errors["write"] = [OSError(errno.EIO, "no")]
        with pytest.raises(BlockError):
            await cow.commit()
        assert cow.clusters == 2
        base.errors["flush"] = [OSError(errno.EIO, "no")]
        with pytest.raises(BlockError):
            await cow.commit()
        assert cow.clusters == 0
        base.begun.clear()
        await finish(device.flush())
        await finish(device.flush())
        assert base.begun == [("flush", 0, 0)]

    asyncio.run(main())


def test_two_writes_to_two_parts_of_a_cluster_at_once() -> None:
    """The race of two that bring up the same cluster.

    first                                second
    1 reads the cluster from below
                                         2 reads the cluster from below
    3 writes it with its part
                                         4 writes it with its part: the first one's part must stay
    """

    async def main() -> None:
        base = Waiting(SIZE)
        device = Device(Cow(base, cluster=CLUSTER))
        base.held.add("read")
        tasks = [asyncio.ensure_future(finish(device.write(offset, b"x" * 100))) for offset in (0, 200, 400)]
        whole = asyncio.ensure_future(finish(device.write(CLUSTER, b"y" * 2 * CLUSTER)))
        await turns()
        assert whole.done()                                     # whole clusters need nothing from below
        assert not any(task.done() for task in tasks)
        await base.hold_no_more()
        await asyncio.gather(*tasks)
        assert bytes(await finish(device.read(0, 500))) == (b"x" * 100 + bytes(100)) * 2 + b"x" * 100

    asyncio.run(main())


def test_a_write_during_commit_is_not_lost() -> None:
    """A write to a cluster that is on its way down waits for that, and then is in the overlay again."""

    async def main() -> None:
        base = Waiting(SIZE)
        cow = Cow(base, cluster=CLUSTER)
        device = Device(cow)
        await finish(device.write(0, b"a" * CLUSTER))
        base.held.add("write")
        commit = asyncio.ensure_future(cow.commit())
        await turns()
        write = asyncio.ensure_future(finish(device.write(5, b"!")))
        await turns()
        assert not write.done()
        await base.hold_no_more()
        await asyncio.gather(commit, write)
        assert bytes(await finish(device.read(4, 3))) == b"a!a"
        assert bytes(base.memory.read(4, 3)) == b"aaa"
        assert cow.clusters == 1

    asyncio.run(main())


def test_failed_copy_up_changes_nothing() -> None:
    async def main() -> None:
        base = Waiting(SIZE)
        cow = Cow(base, cluster=CLUSTER)
        device = Device(cow)
        base.errors["read"] = [OSError(errno.EIO, "no")]
        with pytest.raises(BlockError):
            await finish(device.write(5, b"!"))
        assert cow.clusters == 0
        await finish(device.write(5, b"!"))
        assert bytes(await finish(device.read(4, 3))) == b"\0!\0"

    asyncio.run(main())


def test_overlay_in_a_sparse_file_goes_with_the_filter(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "overlay"
        device = Device(Cow(filled(), overlay=path, cluster=CLUSTER))
        await finish(device.write(CLUSTER, b"file"))
        assert path.stat().st_size == SIZE
        assert bytes(await finish(device.read(CLUSTER, 5))) == b"fileb"
        await finish(device.flush())
        await device.close()
        assert not path.exists()

    asyncio.run(main())


def test_overlays_that_will_not_do(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"precious")
    with pytest.raises(UsageError, match="exists"):
        Cow(filled(), overlay=path)
    assert path.read_bytes() == b"precious"
    for overlay in (Memory(SIZE - 1), Readonly(Memory(SIZE))):
        with pytest.raises(UsageError, match="cannot be the overlay"):
            Cow(filled(), overlay=overlay)
    for cluster in (0, 100, 5000, 1 << 30):
        with pytest.raises(UsageError, match="a cluster of"):
            Cow(filled(), cluster=cluster)
    with pytest.raises(UsageError, match="make them larger"):
        Cow(Memory(1 << 50))


def test_over_files_it_waits_only_where_they_do(tmp_path: Path) -> None:
    async def main() -> None:
        base = File(tmp_path / "base", size=SIZE, create=True)
        device = Device(Cow(base, cluster=CLUSTER))
        await finish(device.write(0, b"x" * CLUSTER))
        assert is_inline(device.read(0, CLUSTER))
        assert is_inline(device.write(5, b"again"))
        await device.close()

    asyncio.run(main())


def test_a_commit_waits_for_changes_that_are_on_their_way_to_the_overlay() -> None:
    """What it did before:

    write   the cluster is here: to the overlay, which lets it wait
    commit                                      reads the old bytes there, brings them down: the cluster is below
    write   the overlay has it: nobody looks there any more
    """

    async def main() -> None:
        base, overlay = filled(), Waiting(SIZE)
        cow = Cow(base, overlay=overlay, cluster=CLUSTER)
        device = Device(cow)
        await finish(device.write(0, b"1" * CLUSTER))
        overlay.held.add("write")
        overlay.begun.clear()
        changing = [asyncio.ensure_future(finish(device.write(offset, b"2"))) for offset in (0, 1)]
        await turns(20)
        assert overlay.begun == [("write", 0, 1), ("write", 1, 1)]      # side by side
        committing = asyncio.ensure_future(cow.commit())
        await turns(20)
        assert overlay.begun[2:] == []
        await overlay.hold_no_more()
        await asyncio.gather(*changing)
        assert await committing == CLUSTER
        assert bytes(base.read(0, 3)) == b"221"
        assert bytes(await finish(device.read(0, 3))) == b"221"
        await device.close()

    asyncio.run(main())
