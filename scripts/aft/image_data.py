# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Pictures with labels: from folders, from the files of MNIST, and from what `datasets` reads."""

import hashlib
import io
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from PIL import ExifTags, Image, ImageOps

from aft.console import one_line
from aft.data_sets import PARTS, choose_parts, load_tables
from aft.flags import did_you_mean
from aft.raw_files import file_bytes


IDX = re.compile(r"(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")
FOLDERS = {"train": ("train", "training"), **PARTS}
MOST_PIXELS = 64**2  # of pictures that are kept in memory
MOST_BYTES = 1 << 30  # of all of them
QUARTER_TURNS = (5, 6, 7, 8)  # orientations of EXIF in which width and height change places


class Pictures:
    """Pictures and the class of each. Subclasses open them."""

    def __init__(self, labels: Sequence[int]):
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, index: int) -> Image.Image:
        """A picture, which may not be decoded yet."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What errors call it."""
        raise NotImplementedError

    def content(self) -> Iterator[bytes]:
        """What identifies the pictures, without decoding them."""
        raise NotImplementedError

    def decode(self, index: int) -> Image.Image:
        """
        A picture as the pipelines of transformers see it, but not in RGB yet.

        Raises:
            ValueError: it is damaged; names it.
        """
        try:
            picture = ImageOps.exif_transpose(self.open(index))
            picture.load()
            return picture
        except Exception as error:  # of PIL, whose decoders raise anything
            raise ValueError(f"{self.name(index)}: no whole picture: {one_line(error)}") from error

    def size(self, index: int) -> tuple[int, int]:
        """Width and height of the picture that `decode` gives, by the head of the file."""
        try:
            picture = self.open(index)
            if picture.format == "TIFF":  # some versions of PIL turn the size of one when they open it
                return self.decode(index).size
            # Not the method of PNG, which reads the whole file.
            orientation = Image.Image.getexif(picture).get(ExifTags.Base.Orientation)
            return picture.size[::-1] if orientation in QUARTER_TURNS else picture.size
        except Exception as error:
            raise ValueError(f"{self.name(index)}: no picture: {one_line(error)}") from error

    def sha256(self) -> str:
        digest = hashlib.sha256(self.labels.tobytes())
        for part in self.content():
            digest.update(part)
        return digest.hexdigest()


class ArrayPictures(Pictures):
    """Pictures of one size in memory: uint8 [N, H, W] or [N, H, W, 3]."""

    def __init__(self, array: np.ndarray, labels: Sequence[int]):
        super().__init__(labels)
        self.array = array

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.array[index])

    def name(self, index: int) -> str:
        return f"picture {index}"

    def content(self) -> Iterator[bytes]:
        yield np.ascontiguousarray(self.array).data


class FilePictures(Pictures):
    """A file per picture."""

    def __init__(self, paths: list[Path], labels: Sequence[int]):
        super().__init__(labels)
        self.paths = paths

    def open(self, index: int) -> Image.Image:
        return Image.open(self.paths[index])

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def content(self) -> Iterator[bytes]:
        for path in self.paths:
            yield f"{path.parent.name}/{path.name} {path.stat().st_size}\n".encode(errors="surrogateescape")


class TablePictures(Pictures):
    """A column of a data set."""

    def __init__(self, table: datasets.Dataset, column: str, labels: Sequence[int], name: str):
        super().__init__(labels)
        self.feature = table.features[column]
        self.table = table.cast_column(column, datasets.Image(decode=False))
        self.column, self.title = column, name

    def open(self, index: int) -> Image.Image:
        value = self.table[int(index)][self.column]
        if value["bytes"] is None or self.feature.mode is not None:
            return self.feature.decode_example(value)
        return Image.open(io.BytesIO(value["bytes"]))

    def name(self, index: int) -> str:
        return f"{self.title}, row {index}"

    def content(self) -> Iterator[bytes]:
        yield f"{self.table.num_rows} {self.table.data.nbytes}".encode()


@dataclass
class ImageData:
    """
    Attributes:
        names: of the classes, in order.
        parts: the pictures of "train" and, where there are such, of "validation" and "test".
    """

    names: list[str]
    parts: dict[str, Pictures]


def read_images(inputs) -> ImageData:
    """
    What `--data` is, with small pictures in memory.

    Raises:
        ValueError: it is nothing of what may be there, lacks a part or a column, has a label that training has not, or
            a file that is no picture.
    """
    path, name = Path(inputs.data), f"--data {inputs.data}"
    if path.is_dir() and (files := find_idx(path)):
        data = read_idx(files, name)
    elif path.is_dir() and (tree := find_tree(path)):
        data = read_tree(tree, name)
    else:
        data = read_table(inputs, name)
    if inputs.class_names:
        if len(inputs.class_names) != len(data.names):
            raise ValueError(
                f"--class_names must be {len(data.names)} names for {name}, got {len(inputs.class_names)}"
            )
        data.names = list(inputs.class_names)
    if len(data.names) < 2:
        raise ValueError(f"{name}: must have at least 2 labels, has {data.names}")
    return ImageData(data.names, {part: in_memory(pictures) for part, pictures in data.parts.items()})


def in_memory(pictures: Pictures) -> Pictures:
    """
    The pictures in memory, if all have one size and are small; else as they are, after a look at the head of each.

    Raises:
        ValueError: one is damaged.
    """
    if isinstance(pictures, ArrayPictures):
        return pictures
    sizes = {pictures.size(index) for index in range(len(pictures))}
    width, height = next(iter(sizes))
    if len(sizes) > 1 or width * height > MOST_PIXELS or 3 * width * height * len(pictures) > MOST_BYTES:
        return pictures
    decoded = [pictures.decode(index) for index in range(len(pictures))]
    if len({picture.size for picture in decoded}) > 1:  # a PNG may have its orientation behind its pixels
        return pictures
    mode = "L" if {picture.mode for picture in decoded} <= {"1", "L"} else "RGB"
    array = np.stack([np.asarray(picture.convert(mode)) for picture in decoded])
    return ArrayPictures(array, pictures.labels)


# The files of MNIST


def find_idx(folder: Path) -> dict[tuple[str, str], Path]:
    """Files of a folder by part ("train", "test") and kind ("images", "labels")."""
    found = ((IDX.fullmatch(path.name), path) for path in sorted(folder.iterdir()))
    return {("train" if match[1] == "train" else "test", match[2]): path for match, path in found if match}


def read_idx(files: dict[tuple[str, str], Path], name: str) -> ImageData:
    """
    The pictures of MNIST's format: train, and test if it is there.

    Raises:
        ValueError: a file is missing or damaged.
    """
    parts = {}
    for part in ("train", "test") if any(key[0] == "test" for key in files) else ("train",):
        for kind in ("images", "labels"):
            if (part, kind) not in files:
                raise ValueError(
                    f"{name}: no file of {part} {kind} beside {', '.join(p.name for p in files.values())}"
                )
        array, labels = (read_idx_file(files[part, kind], axes) for kind, axes in (("images", 3), ("labels", 1)))
        if len(array) != len(labels):
            raise ValueError(f"{name}: {len(array)} {part} pictures have {len(labels)} labels")
        parts[part] = ArrayPictures(array, labels)
    count = 1 + max(int(pictures.labels.max()) for pictures in parts.values())
    return ImageData([str(label) for label in range(count)], parts)


def read_idx_file(path: Path, axes: int) -> np.ndarray:
    """The bytes of an array of so many axes, none of which is empty."""
    content = file_bytes(path)
    head = 4 + 4 * axes
    if len(content) >= head and content[:4] == bytes([0, 0, 8, axes]):
        shape = struct.unpack(f">{axes}I", content[4:head])
        if 0 < np.prod(shape, dtype=object) == len(content) - head:
            return np.frombuffer(content, np.uint8, offset=head).reshape(shape)
    raise ValueError(f"{path}: must be a whole IDX file of bytes with {axes} axes")


# Folders


def class_folders(folder: Path) -> list[Path]:
    """The folders with pictures in a folder, in order of their names."""
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [path for path in found if picture_files(path)]


def picture_files(folder: Path) -> list[Path]:
    """All files in a folder whose suffix PIL knows, in order of their names."""
    known = Image.registered_extensions()
    found = (path for path in folder.rglob("*") if path.suffix.lower() in known and not path.name.startswith("."))
    return sorted(path for path in found if path.is_file())


def find_tree(folder: Path) -> dict[str, list[Path]]:
    """The class folders of each part; a folder without parts is train. Empty if there are none."""
    parts = {}
    for part, names in FOLDERS.items():
        found = [folder / name for name in names if (folder / name).is_dir()]
        if found and (classes := class_folders(found[0])):
            parts[part] = classes
    if parts:
        return parts if "train" in parts else {}
    classes = class_folders(folder)
    return {"train": classes} if classes else {}


def read_tree(tree: dict[str, list[Path]], name: str) -> ImageData:
    """The pictures of class folders."""
    names = [folder.name for folder in tree["train"]]
    parts = {}
    for part, folders in tree.items():
        paths, labels = [], []
        for folder in folders:
            if folder.name not in names:
                like = did_you_mean(folder.name, names)
                raise ValueError(f"{name}: the class {folder.name} of {part} is not among those of train{like}")
            found = picture_files(folder)
            paths += found
            labels += [names.index(folder.name)] * len(found)
        parts[part] = FilePictures(paths, labels)
    return ImageData(names, parts)


# Data sets


def choose_tables(inputs, name: str) -> tuple[datasets.DatasetDict, dict[str, str]]:
    """
    What `datasets` reads, and which of it is "train" and, where there are such, "validation" and "test".

    Raises:
        ValueError: it does not load, or there is no such part, or an empty one.
    """
    problem = "no pictures in folders of classes, no IDX files, and no data set"
    tables = load_tables(inputs.data, inputs.data_config, name, problem)
    return tables, choose_parts(tables, inputs, name)


def read_table(inputs, name: str) -> ImageData:
    """
    The pictures of a data set.

    Raises:
        ValueError: it does not load, or has no such part or column.
    """
    tables, chosen = choose_tables(inputs, name)
    features = tables[inputs.train_split].features
    column = find_column(features, inputs.image_column, datasets.Image, "image", name)
    label_column = find_column(features, inputs.label_column, datasets.ClassLabel, "label", name)
    values = {part: tables[split][label_column] for part, split in chosen.items()}
    if isinstance(features[label_column], datasets.ClassLabel):
        names, indices = features[label_column].names, range(features[label_column].num_classes)
    else:
        indices = sorted(set(values["train"]))
        names = [str(value) for value in indices]
    classes = {value: number for number, value in enumerate(indices)}
    parts = {}
    for part, split in chosen.items():
        if unknown := sorted({str(value) for value in values[part] if value not in classes}):
            raise ValueError(f"{name}: unknown label {unknown[0]} in column {label_column!r} of {split}")
        labels = [classes[value] for value in values[part]]
        parts[part] = TablePictures(tables[split], column, labels, f"{name}, {split}")
    return ImageData(list(names), parts)


def find_column(features, asked: str | None, kind: type, role: str, name: str) -> str:
    """The column of pictures or of labels: the one that was asked for, or the only one of its kind, or `role`."""
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    column = asked or (found[0] if len(found) == 1 else role)
    if column not in features or (role == "image" and column not in found):
        known = ", ".join(map(repr, found or features))
        raise ValueError(f"{name}: no column {column!r} of {role}s, only {known}; --{role}_column says which to take")
    return column
