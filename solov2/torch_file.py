"""Inspection of a file that `torch.save` wrote, before torch reads it: checksums, and what its pickle would build.

torch does not compare the checksums of an archive, and its restricted unpickler runs no foreign code but can be made to
allocate any amount of memory (`bytearray(10**10)`), to hash for years, or to read past the end of a record. So the
opcodes of the pickle are interpreted here first, without building anything: only tensors over stored data, plain values
and a few containers pass.
"""

from __future__ import annotations

import io
import logging
import math
import os
import pickletools
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO

from solov2.errors import InputError, printable

LOG = logging.getLogger(__name__)

# mmengine stores its loss history, which contains numpy arrays and functions, in every checkpoint. It is not needed
# here. These names are allowed in a file because loading maps them to a placeholder, whatever they mean elsewhere.
INERT_GLOBALS = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    *(
        f"{package}.multiarray.{function}"
        for package in ("numpy.core", "numpy._core")
        for function in ("_reconstruct", "scalar")
    ),
    "builtins.getattr",
    "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float32", "Float64", "Int32", "Int64", "Bool")),
)
ITEM_SIZES = {  # bytes per element
    "torch.DoubleStorage": 8, "torch.FloatStorage": 4, "torch.HalfStorage": 2, "torch.BFloat16Storage": 2,
    "torch.LongStorage": 8, "torch.IntStorage": 4, "torch.ShortStorage": 2, "torch.CharStorage": 1,
    "torch.ByteStorage": 1, "torch.BoolStorage": 1,
}  # fmt: skip
OTHER_GLOBALS = (  # the callable ones have a rule each in `_call`
    "collections.OrderedDict", "collections.Counter", "builtins.set", "_codecs.encode", "torch.Size", "torch.device",
    *(f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "parameter")),
    *(f"torch.{kind}" for kind in ("float64", "float32", "float16", "bfloat16")),
    *(f"torch.{kind}" for kind in ("int64", "int32", "int16", "int8", "uint8", "bool")),
)  # fmt: skip
GLOBALS = frozenset((*INERT_GLOBALS, *ITEM_SIZES, *OTHER_GLOBALS))
MAX_OPCODES = 1_000_000  # a ResNeXt-101 with AdamW and a weight average has 90,000; each costs up to about 100 bytes
MAGIC_NUMBER, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001  # of torch's format before 1.6, five pickles and raw data
CHUNK = 2**20  # bytes
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
OTHER_OBJECTS = "other than tensors and plain values, and loading them could run code; save a plain state dict instead"


class Refused(Exception):
    """The file is not what `torch.save` writes for tensors and plain values; the message completes "it ..."."""


def check_torch_file(file: BinaryIO, path: Path) -> None:
    """Check an open file: that it is whole, and that `torch.load` can build it within about its own size.

    Raises:
        InputError: it is no checkpoint, it is damaged (an archive's CRC-32), it claims more data than it holds, or its
            pickle contains more than tensors and plain values.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        if file.read(4) == b"PK\x03\x04":
            _check_archive(file, size, path)
        else:
            file.seek(0)
            _check_legacy(file, size)
            LOG.warning(
                "%s has no checksums (torch's format before 1.6), so damage to its tensors cannot be noticed; "
                "rewrite it with `solov2 convert`",
                path,
            )
    except Refused as error:
        raise InputError(f"{path} is rejected: it {error}") from error
    except zipfile.BadZipFile as error:
        if "CRC-32" in str(error):
            raise InputError(f"{path} is damaged: {printable(str(error))}; use another copy") from error
        raise InputError(f"{path} cannot be read as a checkpoint; it is truncated or damaged") from error
    except Exception as error:  # given arbitrary bytes, zipfile and pickletools can raise anything
        raise InputError(f"{path} is not a checkpoint file, or it is truncated or damaged") from error


def _check_archive(file: BinaryIO, size: int, path: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        compressed = [record for record in records if record.compress_type != zipfile.ZIP_STORED]
        if compressed:
            largest = max(compressed, key=lambda record: record.file_size)
            raise Refused(
                f"has a compressed record, {printable(largest.filename)} ({largest.compress_size} bytes expand to "
                f"{largest.file_size}), which torch never writes; save the checkpoint again with torch.save"
            )
        claimed = sum(record.file_size for record in records)
        if claimed > size:
            raise Refused(f"has records that claim {claimed} bytes, but the file has only {size}")
        by_name = {record.filename.lower(): record for record in records}  # torch ignores the case of names
        pickles = [record for record in records if record.filename.lower().endswith("data.pkl")]
        # A record with the attribute of a folder: torch would not fill the memory that it allocates for the data.
        folders = [record for record in records if record.external_attr & 0x10]
        if folders or len(by_name) < len(records) or len(pickles) != 1:
            raise Refused("is an archive, but not one that torch.save writes")
        if not any(record.CRC for record in records):  # torch.serialization.set_crc32_options(False)
            LOG.warning("%s was written without checksums, so damage to its tensors cannot be noticed", path)
            for record in records:
                record.CRC = None  # type: ignore[assignment]  # zipfile then compares nothing
        for record in records:
            with archive.open(record) as stream:  # compares the CRC-32 at the end
                while stream.read(CHUNK):
                    pass
        content = _Pickle()
        content.interpret(io.BytesIO(archive.read(pickles[0])))
        folder = pickles[0].filename.lower().removesuffix("data.pkl")
        for key, claimed in content.storages.items():
            stored = by_name.get(f"{folder}data/{key}".lower())
            if stored is None or claimed > stored.file_size:
                raise Refused(f"claims {claimed} bytes for storage {printable(key)}, which has fewer")


def _check_legacy(file: BinaryIO, size: int) -> None:
    stream: Any = _Bounded(file, size)
    content = _Pickle()
    if content.interpret(stream) != MAGIC_NUMBER or content.interpret(stream) != LEGACY_VERSION:
        raise ValueError("not a file of torch.save")
    content.interpret(stream)  # the platform it was written on
    content.interpret(stream)
    keys = content.interpret(stream)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("no list of storages")
    if sorted(keys) != sorted(content.storages):
        raise ValueError("a storage is not stored")
    claimed, left = sum(8 + nbytes for nbytes in content.storages.values()), size - file.tell()
    if claimed > left:
        raise Refused(f"claims {claimed} bytes of tensors, but has only {left}")


class _Bounded:
    """A file for `pickletools`, which asks for as many bytes as the file claims; they would be allocated first."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.tell = file, size, file.tell

    def read(self, count: int) -> bytes:
        return self.file.read(min(count, self.size - self.file.tell()))

    def readline(self) -> bytes:
        return self.file.readline(1000)


@dataclass(frozen=True)
class _Global:
    """A name that a pickle imports."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """Stored data; `elements` is their number."""

    elements: int


class _Value:
    """A tensor, bytes, a set or the like: an object that nothing else is built from."""


class _Inert(_Value):
    """What a name of `INERT_GLOBALS` returns: nothing is ever done with it."""


@dataclass
class _Pickle:
    """Interprets pickles, with symbols in place of objects; of dictionaries it keeps the keys.

    Nothing is hashed, compared or printed in depth, since a few opcodes can nest a tuple 100 times in itself.
    """

    storages: dict[str, int] = field(default_factory=dict)  # key -> bytes
    opcodes: int = 0  # read, plus the items that calls copied: a few opcodes can copy the same list over and over
    text: int = 0  # characters read and not yet copied into bytes

    def interpret(self, stream: IO[bytes]) -> Any:
        """Read one pickle and return what it builds.

        Raises:
            Refused: it is not made of tensors and plain values.
            Exception: of any kind, if it is not a pickle.
        """
        stack: list[Any] = []
        outer: list[list[Any]] = []  # the stacks below each mark
        memo: dict[int, Any] = {}
        argument: Any
        for opcode, argument, _ in pickletools.genops(stream):
            self.opcodes += 1
            if self.opcodes > MAX_OPCODES:
                raise Refused(f"has more than {MAX_OPCODES:,} opcodes besides the data of its tensors")
            match opcode.name:
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                    stack.append(argument)
                case "BINUNICODE" | "SHORT_BINSTRING":
                    self.text += len(argument)
                    stack.append(argument)
                case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                    stack.append(CONSTANTS[opcode.name])
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append({})
                case "MARK":
                    outer.append(stack)
                    stack = []
                case "TUPLE" | "APPENDS" | "SETITEMS":
                    items, stack = stack, outer.pop()
                    _collect(stack, opcode.name, items)
                case "TUPLE1" | "TUPLE2" | "TUPLE3" | "APPEND" | "SETITEM":
                    count = {"APPEND": 1, "SETITEM": 2}.get(opcode.name) or int(opcode.name[-1])
                    items, stack[-count:] = stack[-count:], []
                    _collect(stack, opcode.name, items)
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "GLOBAL":
                    stack.append(_find_global(argument))
                case "REDUCE" | "NEWOBJ":
                    arguments = stack.pop()
                    stack[-1] = self._call(stack[-1], arguments, only_inert=opcode.name == "NEWOBJ")
                case "BUILD":
                    state = stack.pop()
                    if not (isinstance(stack[-1], _Inert) or isinstance(stack[-1], dict) and isinstance(state, dict)):
                        raise Refused(f"contains objects {OTHER_OBJECTS}")
                    self._charge([state])
                case "BINPERSID":
                    stack[-1] = self._storage(stack[-1])
                case "STOP":
                    return stack[-1]
                case name if name != "PROTO":
                    raise Refused(f"contains objects {OTHER_OBJECTS} (opcode {name})")
        raise ValueError("the pickle has no end")

    def _storage(self, identifier: Any) -> _Storage:
        """The storage of ("storage", type, key, device, number of elements[, None])."""
        match identifier:
            case ("storage", _Global(name), str(key), str(), int(elements), *rest) if rest in ([], [None]):
                nbytes = elements * ITEM_SIZES[name]
                if elements < 0 or self.storages.setdefault(key, nbytes) != nbytes:
                    raise Refused(f"has two sizes of storage {printable(key)}")
                return _Storage(elements)
        raise Refused("has data that belongs to no tensor; save a plain state dict")

    def _call(self, function: Any, arguments: Any, *, only_inert: bool) -> Any:
        """What calling a global with these arguments returns.

        Raises:
            Refused: `torch.save` does not write such a call.
        """
        name = function.name if isinstance(function, _Global) else ""
        if name in INERT_GLOBALS:
            return _Inert()
        self._charge(arguments)
        match () if only_inert else (name, arguments):
            case (
                "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2",
                (storage, offset, size, step, *_),
            ):
                return _tensor(storage, offset, size, step)
            case ("torch._utils._rebuild_parameter", (_Value(), bool(), dict())):
                return _Value()
            case ("collections.OrderedDict", ()):
                return {}
            case ("collections.Counter", () | ({},)):
                return {}
            case ("builtins.set" | "torch.Size", (([*items] | (*items,)),)) if all(map(_is_key, items)):
                return tuple(items) if name == "torch.Size" else _Value()
            case ("torch.device", (str(), *_)):
                return _Value()
            case ("_codecs.encode", (str(text), "latin1")) if len(text) <= self.text:
                self.text -= len(text)
                return _Value()
        raise Refused(f"contains objects {OTHER_OBJECTS} (a call of {name or 'an object'})")

    def _charge(self, arguments: Any) -> None:
        self.opcodes += sum(len(each) for each in arguments if isinstance(each, (list, tuple, dict)))


def _collect(stack: list[Any], opcode: str, items: list[Any]) -> None:
    """Make a tuple of the items, or put them into the list or dictionary on top of the stack."""
    if opcode.startswith("TUPLE"):
        stack.append(tuple(items))
    elif opcode.startswith("APPEND") and isinstance(stack[-1], list):
        stack[-1].extend(items)
    elif opcode.startswith("SETITEM") and isinstance(stack[-1], dict):
        if not all(map(_is_key, items[::2])):
            raise Refused("has a dictionary whose keys are neither text nor numbers")
        stack[-1].update(dict.fromkeys(items[::2]))
    else:
        raise Refused(f"contains objects {OTHER_OBJECTS}")


def _find_global(argument: str) -> _Global:
    module, _, name = argument.partition(" ")
    name = f"{'builtins' if module == '__builtin__' else module}.{name}"  # as torch does for Python 2's name
    if name not in GLOBALS:
        raise Refused(f"contains objects {OTHER_OBJECTS} ({printable(name[:100])})")
    return _Global(name)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> _Value:
    """A tensor over a storage: it must lie within, since torch enlarges some storages to what a tensor claims."""
    numbers = (offset, *size, *stride)
    if not isinstance(storage, _Storage) or len(size) != len(stride) or len(size) > 64:
        raise Refused("has a tensor without data")
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise Refused("has a tensor of negative size")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= storage.elements:
        raise Refused(f"has a tensor {list(size)} that is larger than its stored data ({storage.elements} elements)")
    return _Value()


def _is_key(value: Any) -> bool:
    """Whether hashing takes no time: text, a number, None, or a tuple of these."""
    return all(
        isinstance(item, (str, int, float, type(None))) for item in (value if isinstance(value, tuple) else (value,))
    )
