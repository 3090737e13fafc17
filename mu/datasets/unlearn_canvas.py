"""UnlearnCanvas, or any folder with its layout: `<root>/<Style>/<Class>/<n>.jpg`; its names, and how it words prompts.

Styles and classes are those found in the folder. `Seed_Images` holds photographs, whose prompts say `Photo style`.
Source: Zhang et al., UnlearnCanvas, 2024 (arXiv 2402.11846).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mu.config import nearest
from mu.datasets.base import DataSet, Problem, as_problem
from mu.datasets.image_files import check_folder, entries, image_problems, is_image, not_read
from mu.datasets.index import (
    DataError,
    ForgetRetain,
    Row,
    check_apart,
    check_substitutes,
    choose_substitute,
    fill_substitute,
    natural_key,
    next_kept,
    raise_problems,
    suggestion,
)

SEED_STYLE = "Seed_Images"
"""Folder of the unstylised photographs; its prompts say ``Photo``."""
CANVAS_TEMPLATE = "A {object} image in {style} style."
SAMPLE_IMAGES = 3
"""Images a class that `use_sample` keeps: as many as the published sample of the data set has."""
_ADVICE = "Download it with `download_data sample quick_canvas`, or give a folder laid out as <Style>/<Class>/<n>.jpg."

_STYLES = """
Abstractionism Artist_Sketch Blossom_Season Bricks Byzantine Cartoon Cold_Warm Color_Fantasy Comic_Etch Crayon
Cubism Dadaism Dapple Defoliation Early_Autumn Expressionism Fauvism French Glowing_Sunset Gorgeous_Love Greenfield
Impressionism Ink_Art Joy Liquid_Dreams Magic_Cube Meta_Physics Meteor_Shower Monet Mosaic Neon_Lines On_Fire Pastel
Pencil_Drawing Picasso Pop_Art Red_Blue_Ink Rust Seed_Images Sketch Sponge_Dabbed Structuralism Superstring
Surrealism Ukiyoe Van_Gogh Vibrant_Flow Warm_Love Warm_Smear Watercolor Winter
"""
_OBJECTS = """
Architectures Bears Birds Butterfly Cats Dogs Fishes Flame Flowers Frogs Horses Human Jellyfish Rabbits Sandwiches
Sea Statues Towers Trees Waterfalls
"""
UNLEARN_CANVAS_STYLES: tuple[str, ...] = tuple(_STYLES.split())
"""50 styles, and the photographs (`Seed_Images`) as class 38: the order of the data set's classifiers."""
UNLEARN_CANVAS_OBJECTS: tuple[str, ...] = tuple(_OBJECTS.split())


class UnlearnCanvas(DataSet):
    about = "folders of images, <raw_dataset_dir>/<Style>/<Class>/<n>.jpg."
    retain_sets = ("others", "seed_images", "generated")

    def folder_problems(self) -> Iterator[Problem]:
        """As far as the names of folders tell: its images are many."""
        root, template = Path(self.config.raw_dataset_dir), self.config.template
        if not root.is_dir():
            message = f"there is no folder {root}; `download_data sample quick_canvas` makes data/quick-canvas-dataset/sample"
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
                    f"{suggestion(target, names)}"
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
        check_substitutes(forget)
        found = ForgetRetain(tuple(forget), tuple(retain), tuple(not_read(root, others)))
        check_apart(found)
        return found

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


StandIns = Mapping[str, tuple[str | None, str | None]]
"""Forgotten style or object -> what stands in for it, see `choose_substitute`."""


def canvas_row(image: Path, style: str, object: str, *, template: str, stand_ins: StandIns) -> Row:
    """The row of an image `<Style>/<Object>/<file>` of a grid; it is to be forgotten if `stand_ins` has its concept."""
    concept = style if template == "style" else object
    name, whole_prompt = stand_ins.get(concept, (None, None))
    substitute = None
    if whole_prompt is not None:
        substitute = fill_substitute(whole_prompt, style=style_words(style), object=object)
    elif name is not None:
        substitute = canvas_prompt(object, name) if template == "style" else canvas_prompt(name, style)
    return Row(
        image,
        f"{style}/{object}/{image.name}",
        canvas_prompt(object, style),
        style,
        object,
        concept,
        substitute,
    )


def style_words(style: str) -> str:
    """A style's folder name as a prompt says it: ``Van_Gogh`` -> ``Van Gogh``, ``Seed_Images`` -> ``Photo``."""
    return "Photo" if style == SEED_STYLE else style.replace("_", " ")


def canvas_prompt(object: str, style: str) -> str:
    """The prompt for an image of ``object`` in ``style``, both as their folders are called.

    Source: UnlearnCanvas (Zhang et al., 2024), data set card: ``A {object} image in {style} style.``
    """
    return CANVAS_TEMPLATE.format(object=object.replace("_", " "), style=style_words(style))


def _no_images(root: Path) -> str:
    """What is said of a folder of another layout."""
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
