"""Pages that leave and come back: bit for bit, or an error and nothing."""

import os
import random
import stat
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from quantpage.cache import CacheLayout, PagedKVCache
from quantpage.cache.saved import read_pages
from quantpage.cache.tensor_file import Damaged, open_whole
from quantpage.errors import CacheError, CorruptCache
from quantpage.formats import FORMATS, Code, KeyMap, KVFormat, QuantSpec
from tests.cache.forging import filled, planes

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("name", FORMATS)
def test_what_was_saved_is_what_is_loaded(name, tmp_path):
    cache = filled(name)
    cache.save(tmp_path / "pages", note={"tokens": [1, 2, 3]})
    loaded, note = PagedKVCache.load(tmp_path / "pages", expected=cache.layouts)
    assert note == {"tokens": [1, 2, 3]}
    assert (loaded.pages, loaded.exact_pages, loaded.nbytes) == (5, 3, cache.nbytes)
    for mine, theirs in zip(planes(cache), planes(loaded), strict=True):
        assert torch.equal(mine, theirs)
    assert os.listdir(tmp_path) == ["pages"], "no temporary file stays"


def test_chosen_pages_are_numbered_in_their_order(tmp_path):
    cache = filled()
    cache.save(tmp_path / "pages", [4, 1], [2])
    loaded, _ = PagedKVCache.load(tmp_path / "pages")
    assert (loaded.pages, loaded.exact_pages) == (2, 1)
    assert torch.equal(loaded.layer(0).key.codes, cache.layer(0).key.codes[[4, 1]])
    assert torch.equal(
        loaded.layer(0).exact_key.view(torch.uint8), cache.layer(0).exact_key[[2]].view(torch.uint8)
    )


def test_every_altered_byte_is_found(tmp_path):
    path = tmp_path / "pages"
    filled(pages=2, exact_pages=1).save(path)
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    draw = random.Random(0)
    places = [*draw.sample(range(header), 100), *draw.sample(range(header, len(whole)), 40)]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(CorruptCache):
            PagedKVCache.load(path)


@pytest.mark.parametrize("kept", [0, 5, 8, 100, 2000, -1])
def test_a_truncated_file_is_refused(kept, tmp_path):
    path = tmp_path / "pages"
    filled().save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CorruptCache, match="expected a whole safetensors file"):
        PagedKVCache.load(path)


def test_another_format_is_refused(tmp_path):
    filled("int8").save(tmp_path / "pages")
    wanted = {index: CacheLayout(2, 32, FORMATS["int8"], 16) for index in range(2)}
    wanted[1] = CacheLayout(2, 32, FORMATS["fp8"], 16)
    with pytest.raises(CorruptCache, match="layer 1, format: expected fp8, got int8"):
        PagedKVCache.load(tmp_path / "pages", expected=wanted)
    wanted[1] = CacheLayout(2, 32, FORMATS["int8"], 64)
    with pytest.raises(CorruptCache, match="layer 1, page_size: expected 64, got 16"):
        PagedKVCache.load(tmp_path / "pages", expected=wanted)
    with pytest.raises(CorruptCache, match=r"expected layers \[0\], got layers \[0, 1\]"):
        PagedKVCache.load(tmp_path / "pages", expected={0: wanted[0]})


def test_a_file_of_something_else_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "model")
    with pytest.raises(CorruptCache, match="expected a file of quantpage pages, got kind None"):
        PagedKVCache.load(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="expected a file of saved pages"):
        PagedKVCache.load(tmp_path / "nothing")


def test_a_failed_save_leaves_the_old_file(tmp_path):
    cache, path = filled(), tmp_path / "pages"
    cache.save(path, note={"age": "old"})
    with pytest.raises(TypeError, match="not JSON serializable"):
        cache.save(path, note={"age": object()})
    assert PagedKVCache.load(path)[1] == {"age": "old"}
    assert os.listdir(tmp_path) == ["pages"]


@pytest.mark.parametrize("name", ["none", "int8", "fp8", "int4", "int4_static"])
def test_swapped_pages_come_back_elsewhere(name):
    cache = filled(name)
    before = [plane.clone() for plane in planes(cache)]
    host = cache.swap_out([3, 0], [1] if cache.layer(0).exact_key is not None else [])
    assert host.nbytes == cache.used_bytes(2, host.exact_pages)
    cache.swap_in(host, [2, 1], [0][: host.exact_pages])
    for old, new, exact in zip(before, planes(cache), is_exact(cache), strict=True):
        if exact:
            assert torch.equal(new[0], old[1]) and torch.equal(new[1:], old[1:])
        elif old.shape[0] == 5:
            assert torch.equal(new[[2, 1]], old[[3, 0]])
            assert torch.equal(new[[0, 3, 4]], old[[0, 3, 4]])
        else:
            assert torch.equal(new, old), "static scales do not move"
    with pytest.raises(ValueError, match="pages: expected 2, as were swapped out; got 1"):
        cache.swap_in(host, [1])


def is_exact(cache):
    """For each of ``planes``: whether its first dimension is exact pages."""
    return [
        each is view.exact_key or each is view.exact_value
        for view in map(cache.layer, cache.layouts)
        for each in (
            *(view.key.codes, view.key.scale, view.key.zero),
            *(view.value.codes, view.value.scale, view.value.zero),
            *(view.exact_key, view.exact_value),
        )
        if each is not None
    ]


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_a_key_map_goes_with_its_pages(mean, turned, tmp_path):
    cache = PagedKVCache(3, 3)
    turn = torch.eye(32) + 0.1 * torch.rand(2, 32, 32) if turned else None
    mapped = KeyMap(torch.rand(2, 32) - 1.5, torch.randn(2, 32) if mean else None, turn=turn)
    cache.add_layer(0, CacheLayout(2, 32, FORMATS["int4"], 16), key_map=mapped)
    cache.grow(2)
    cache.save(tmp_path / "pages")
    loaded = PagedKVCache.load(tmp_path / "pages")[0].layer(0).key_map
    assert cache.layer(0).key_map == mapped and loaded.digest() == mapped.digest()
    assert (loaded.unturn is not None) == turned


def test_safetensors_reads_what_we_write(tmp_path):
    path = tmp_path / "pages"
    filled().save(path)
    theirs, ours = load_file(path), read_pages(path).planes
    assert theirs.keys() == ours.keys()
    for name, plane in ours.items():
        assert torch.equal(theirs[name].view(torch.uint8), plane.view(torch.uint8))


def test_scales_that_layers_share_are_saved(tmp_path):
    layout = CacheLayout(2, 32, FORMATS["int8_static"], 16)
    scale = torch.rand(layout.format.key.granularity.scale_shape(2, 32)) + 0.5
    scale = scale.to(layout.format.key.scale_dtype)
    cache = PagedKVCache(1)
    for index in range(2):
        cache.add_layer(index, layout, ((scale, None), (scale, None)))
    cache.save(tmp_path / "pages")
    loaded, _ = PagedKVCache.load(tmp_path / "pages")
    assert torch.equal(loaded.layer(1).value.scale, scale)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_modes_are_those_of_an_ordinary_file(mask, tmp_path):
    before = os.umask(mask)
    try:
        filled().save(tmp_path / "pages")
        (tmp_path / "plain").touch()
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("pages", "plain")]
    assert modes[0] == modes[1] == 0o666 & ~mask
    (tmp_path / "pages").chmod(0o640)
    filled().save(tmp_path / "pages")
    assert stat.S_IMODE((tmp_path / "pages").stat().st_mode) == 0o640


def test_a_link_is_followed(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/pages")
    filled().save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there/pages").is_file()


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    """A file may grow to 8 KiB only: as on a full disk, an error amid the write."""
    path = tmp_path / "pages"
    filled(pages=1, exact_pages=1).save(path, note={"age": "old"})
    script = f"""
import resource
from quantpage.errors import CacheError
from tests.cache.test_saved import filled
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    filled(pages=40).save({str(path)!r})
except CacheError as error:
    print(error)
"""
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert made.stdout == f"{path}: expected a place to write to, got File too large\n", made.stderr
    assert PagedKVCache.load(path)[1] == {"age": "old"}
    assert os.listdir(tmp_path) == ["pages"]


@pytest.mark.parametrize("place", ["pipe", ".", "file/pages", "x" * 300])
def test_places_that_are_none(place, tmp_path):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CacheError, match="expected a place to write to, got"):
        filled().save(tmp_path / place)
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_a_folder_that_is_not_there_is_made(tmp_path):
    filled().save(tmp_path / "new" / "folder" / "pages", note={"age": 1})
    assert PagedKVCache.load(tmp_path / "new" / "folder" / "pages")[1] == {"age": 1}


class Stop(BaseException):
    """As Ctrl-C is no Exception."""


# Where it comes between the last write and the close, the file is closed as garbage.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_anywhere_leaves_one_whole_file(tmp_path):
    """Raised before each line of the writer in turn."""
    path, old, new = tmp_path / "pages", filled(pages=1), filled(pages=2)
    old.save(path)
    stopped = 0
    for stop in range(1, 1000):
        seen = 0

        def trace(frame, event, _, stop=stop):
            nonlocal seen
            if not frame.f_code.co_filename.endswith("tensor_file.py"):
                return None
            if frame.f_code.co_name == "write_whole" and event == "line":
                seen += 1
                if seen == stop and "part.unlink" not in source(frame):
                    raise Stop
            return trace

        sys.settrace(trace)
        try:
            new.save(path)
        except Stop:
            stopped += 1
        finally:
            sys.settrace(None)
        assert os.listdir(tmp_path) == ["pages"]
        assert PagedKVCache.load(path)[0].pages in (1, 2)
        if seen < stop:
            break
        old.save(path)
    assert stopped > 40


def source(frame):
    """The lines that clean up: an interruption of these is another interruption."""
    import linecache

    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return "part.unlink" if "suppress" in line else line


def test_file_and_folder_reach_the_disk_in_order(tmp_path):
    """What the kernel is asked for, as strace would show it: by an audit of the calls."""
    calls, real = [], (os.fsync, os.replace)

    def fsync(handle):
        folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        calls.append("folder" if folder else os.fstat(handle).st_size)
        real[0](handle)

    def replaced(source, target):
        calls.append("replace")
        real[1](source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "replace", replaced)
        filled().save(tmp_path / "pages")
    assert calls == [(tmp_path / "pages").stat().st_size, "replace", "folder"]


def test_cut_short_between_open_and_read(tmp_path):
    path = tmp_path / "pages"
    filled(pages=40).save(path)
    with (
        pytest.raises(Damaged, match="expected a whole safetensors file, got"),
        open_whole(path) as file,
    ):
        os.truncate(path, 20_000)
        file.read()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    done = []

    def load():
        with pytest.raises(CorruptCache, match="expected a file, got a device or a pipe"):
            PagedKVCache.load(tmp_path / "pipe")
        done.append(True)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(10)
    assert done
    with pytest.raises(CacheError, match="expected a file to read, got Is a directory"):
        PagedKVCache.load(tmp_path)


def test_a_code_that_a_file_cannot_name_is_not_written(tmp_path):
    cache = PagedKVCache(1)
    spec = QuantSpec(Code("int8", torch.int8, -100, 100, 8))
    cache.add_layer(0, CacheLayout(2, 32, KVFormat("mine", spec, spec), 16))
    with pytest.raises(ValueError, match="format: expected codes of"):
        cache.save(tmp_path / "pages")
    assert not os.listdir(tmp_path)
