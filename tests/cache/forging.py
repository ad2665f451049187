"""Caches full of random bytes, and their files with what no writer wrote, under a checksum."""

import json
from contextlib import contextmanager
from copy import deepcopy

import torch

from quantpage.cache import CacheLayout, PagedKVCache
from quantpage.cache.saved import read_pages
from quantpage.cache.tensor_file import checksum, write_whole
from quantpage.formats import FORMATS


def filled(name="int4", pages=5, exact_pages=3):
    """Two layers of different formats, every byte random."""
    cache = PagedKVCache(pages, exact_pages)
    for index, each in enumerate((name, "int8")):
        layout = CacheLayout(2, 32, FORMATS[each], 16)
        static = None
        if not layout.format.dynamic:
            static = tuple(
                tuple(
                    torch.rand(spec.granularity.scale_shape(2, 32)).to(spec.scale_dtype)
                    if wanted
                    else None
                    for wanted in (True, spec.zero_point)
                )
                for spec in (layout.format.key, layout.format.value)
            )
        cache.add_layer(index, layout, static)
    # Scales that were given stay what they are: others are refused when a file is read.
    for plane in (each for each in planes(cache) if each.ndim == 4):
        plane.copy_(torch.randint(0, 256, plane.shape, dtype=torch.uint8))
    return cache


def planes(cache, index=None):
    """Every tensor as bytes."""
    found = []
    for layer in cache.layouts if index is None else [index]:
        view = cache.layer(layer)
        for half in (view.key, view.value):
            found += [half.codes, half.scale, half.zero]
        found += [view.exact_key, view.exact_value]
    return [plane.view(torch.uint8) for plane in found if plane is not None]


class Forged:
    """A whole file, to be written again with changes; each starts from the file as it was."""

    def __init__(self, path):
        self.path, whole = path, path.read_bytes()
        end = 8 + int.from_bytes(whole[:8], "little")
        self.header, self.data = json.loads(whole[8:end]), whole[end:]
        self.saved = read_pages(path)
        self.layouts = self.saved.layouts
        self.metadata = {k: v for k, v in self.header["__metadata__"].items() if k != "checksum"}

    @property
    def shapes(self):
        """Of every layer's planes as bytes, in the order of the tests."""
        names = ["key.codes", "key.scale", "key.zero", "value.codes", "value.scale", "value.zero"]
        names += ["exact_key", "exact_value"]
        return {
            index: [
                self.saved.planes[f"{index}.{name}"].view(torch.uint8).shape
                for name in names
                if f"{index}.{name}" in self.saved.planes
            ]
            for index in self.layouts
        }

    @property
    def planes(self):
        """All, as bytes, in the order of the tests."""
        names = ["key.codes", "key.scale", "key.zero", "value.codes", "value.scale", "value.zero"]
        names += ["exact_key", "exact_value"]
        return [
            self.saved.planes[f"{index}.{name}"].view(torch.uint8)
            for index in self.layouts
            for name in names
            if f"{index}.{name}" in self.saved.planes
        ]

    @contextmanager
    def edited(self):
        """The header, to be changed; the checksum stays, as it is over what tensors are."""
        header = deepcopy(self.header)
        yield header
        text = json.dumps(header).encode()
        self.path.write_bytes(len(text).to_bytes(8, "little") + text + self.data)

    def describe(self, name, text):
        """Other metadata, with a checksum that is right."""
        metadata = {**self.metadata, name: text}
        try:
            metadata["checksum"] = checksum(metadata, self.saved.planes)
        except UnicodeEncodeError:
            metadata["checksum"] = ""
        with self.edited() as header:
            header["__metadata__"] = metadata

    def without(self, name):
        """One plane less."""
        planes = {each: plane for each, plane in self.saved.planes.items() if each != name}
        write_whole(self.path, planes, self.metadata)

    def with_plane(self, name, plane):
        """One plane more."""
        write_whole(self.path, {**self.saved.planes, name: plane}, self.metadata)

    @staticmethod
    def paths(value, before=()):
        """The way to every value within a JSON value, containers counted."""
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for name, each in inner:
            yield [*before, name]
            if isinstance(each, dict | list):
                yield from Forged.paths(each, (*before, name))

    @staticmethod
    def put(value, path, new):
        """A copy with another value there."""
        made = deepcopy(value)
        at = made
        for name in path[:-1]:
            at = at[name]
        if isinstance(at, list) and not isinstance(path[-1], int):
            at.append(new)
        else:
            at[path[-1]] = new
        return made

    @staticmethod
    def drop(value, path):
        """A copy without the value there."""
        made = deepcopy(value)
        at = made
        for name in path[:-1]:
            at = at[name]
        del at[path[-1]]
        return made
