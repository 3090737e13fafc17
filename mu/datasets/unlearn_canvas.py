"""UnlearnCanvas, or any folder with its layout: `<root>/<Style>/<Class>/<n>.jpg`.

Styles and classes are those found in the folder. `Seed_Images` holds photographs, whose prompts say `Photo style`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mu.config import nearest
from mu.datasets.base import WITHOUT_IMAGES, DataSet, Problem, as_problem
from mu.datasets.canvas import SEED_STYLE, StandIns, canvas_row
from mu.datasets.image_files import check_folder, entries, image_problems, is_image, not_read
from mu.datasets.index import (
    DataError,
    ForgetRetain,
    Row,
    choose_substitute,
    natural_key,
    next_kept,
    raise_problems,
)

SAMPLE_IMAGES = 3
"""Images a class that `use_sample` keeps: as many as the published sample of the data set has."""
_ADVICE = "Download it with `download_data sample quick_canvas`, or give a folder laid out as <Style>/<Class>/<n>.jpg."


class UnlearnCanvas(DataSet):
    about = "folders of images, <raw_dataset_dir>/<Style>/<Class>/<n>.jpg."
    retain_sets = ("others", "seed_images", "generated")

    def folder_problems(self) -> Iterator[Problem]:
        """As far as the names of folders tell: its images are many."""
        root, template = Path(self.config.raw_dataset_dir), self.config.template
        if not root.is_dir():
            advice = "`download_data sample quick_canvas` makes data/quick-canvas-dataset/sample"
            message = f"there is no folder {root}; {advice}; {WITHOUT_IMAGES}"
            yield ("raw_dataset_dir",), message
            return
        styles = [folder for folder in root.iterdir() if folder.is_dir()]
        classes = [inner for style in styles for inner in style.iterdir() if inner.is_dir()]
        if not classes:
            yield ("raw_dataset_dir",), _no_images(root)
            return
        folders = styles if template == "style" else classes
        names = sorted({folder.name for folder in folders if not folder.name.startswith(".")})
        unknown = [name for name in self.targets if name not in names]
        if unknown:
            listed = ", ".join(names) if len(names) <= 60 else f"{len(names)} others"
            message = f"there is no {template} {unknown[0]!r} in {root}; it has: {listed}.{nearest(unknown[0], names)}"
            yield ("template_name", "template", "raw_dataset_dir"), message
            return
        yield from as_problem(
            lambda: self._stand_ins(names, [style.name for style in styles]), "raw_dataset_dir"
        )

    def read(self) -> ForgetRetain:
        """Raises DataError.

        The folder is missing or has another layout, a name is not in it, or images cannot be used: links, or files
        that are empty, unreadable, tiny or absurdly large.
        """
        root, template = Path(self.config.raw_dataset_dir), self.config.template
        images, problems, others = _scan(root, limit=SAMPLE_IMAGES if self.config.use_sample else None)
        raise_problems(
            problems,
            what=f"files of {root} cannot be used",
            advice="Replace or delete them; download the data set again if it is incomplete.",
        )
        styles = list(images)
        objects = sorted({name for classes in images.values() for name in classes}, key=natural_key)
        names = styles if template == "style" else objects
        for target in self.targets:
            if target not in names:
                raise DataError(
                    f"template_name: there is no {template} {target!r} in {root}; found: {', '.join(names)}."
                    f"{nearest(target, names)}"
                )
        stand_ins = self._stand_ins(names, styles)

        forget: list[Row] = []
        retain: list[Row] = []
        for style, classes in images.items():
            kept = self.retain_set == "others" or (self.retain_set == "seed_images" and style == SEED_STYLE)
            for object, files in classes.items():
                forgotten = (style if template == "style" else object) in stand_ins
                if forgotten or kept:
                    rows = (
                        canvas_row(path, style, object, template=template, stand_ins=stand_ins)
                        for path in files
                    )
                    (forget if forgotten else retain).extend(rows)
        return ForgetRetain(tuple(forget), tuple(retain), tuple(not_read(root, others)))

    def _stand_ins(self, names: Sequence[str], styles: Sequence[str]) -> StandIns:
        """What stands in for each forgotten name: another, by default the photo, else the next of `names`.

        Raises DataError for a substitute that cannot be, and for photos to retain that are not there, or are to be
        forgotten.
        """
        template, targets = self.config.template, self.targets
        of_styles = template == "style"
        if self.retain_set == "seed_images" and of_styles and SEED_STYLE in targets:
            raise DataError(f"retain_set: {SEED_STYLE} is to be forgotten; use retain_set others.")
        if self.retain_set == "seed_images" and SEED_STYLE not in styles:
            raise DataError(
                f"retain_set: seed_images needs the photos in the folder {SEED_STYLE}, which is not there; "
                "use retain_set others."
            )
        photo = of_styles and SEED_STYLE not in targets
        return {
            target: choose_substitute(
                self.config.substitute,
                template=template,
                target=targets,
                allowed=sorted({*names, SEED_STYLE}) if of_styles else names,
                default=SEED_STYLE if photo else next_kept(target, names, targets),
            )
            for target in targets
        }


def _no_images(root: Path) -> str:
    return (
        f"{root} holds no images laid out as <Style>/<Class>/<n>.jpg; is it the folder above or below the one that is "
        "meant?"
    )


def _scan(root: Path, *, limit: int | None) -> tuple[dict[str, dict[str, list[Path]]], list[str], list[Path]]:
    """Images by style and class, all in natural order; what is wrong with them; and what else lies there."""
    check_folder("raw_dataset_dir", root, advice=_ADVICE)
    inside = root.resolve()
    problems: list[str] = []
    images: dict[str, dict[str, list[Path]]] = {}
    others: list[Path] = []
    for style in entries(root, inside, problems):
        if not style.is_dir():
            others.append(style)
            continue
        classes: dict[str, list[Path]] = {}
        for object in entries(style, inside, problems):
            if not object.is_dir():
                others.append(object)
                continue
            files: list[Path] = []
            for path in entries(object, inside, problems):
                (files if is_image(path) and path.is_file() else others).append(path)
            files = files[:limit]
            if files:
                classes[object.name] = files
        if classes:
            images[style.name] = classes
    files_of = (file for classes in images.values() for files in classes.values() for file in files)
    problems += image_problems(files_of, others=problems)
    if not images and not problems:
        raise DataError(f"raw_dataset_dir: {' '.join([_no_images(root), *not_read(root, others)])}")
    return images, problems, others
