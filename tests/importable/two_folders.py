"""A data set of one's own, as docs/developing.md describes: two folders of numbered images, `forget` and `keep`."""

from __future__ import annotations

from pathlib import Path

from mu.datasets.base import DataSet
from mu.datasets.image_files import check_folder, find_images, image_problems, not_read
from mu.datasets.index import ForgetRetain, Row, raise_problems


class TwoFolders(DataSet):
    about = "forget/ and keep/, two folders of images of one prompt each."

    def read(self) -> ForgetRetain:
        root, name = Path(self.config.raw_dataset_dir), self.targets[0]
        prompts = {"forget": f"a picture of {name}", "keep": "a picture"}
        problems: list[str] = []
        others: list[Path] = []
        rows: dict[str, tuple[Row, ...]] = {}
        for part, prompt in prompts.items():
            check_folder("raw_dataset_dir", root / part, advice="It holds the folders forget and keep.")
            images = find_images(root / part, root.resolve(), problems, others)
            problems += image_problems(images)
            substitute = prompts["keep"] if part == "forget" else None
            rows[part] = tuple(
                Row(path, f"{part}/{path.name}", prompt, "", "", concept=part, substitute_prompt=substitute)
                for path in images
            )
        raise_problems(problems, what=f"files of {root} cannot be used", advice="Replace or delete them.")
        kept = rows["keep"] if self.retain_set == "others" else ()
        return ForgetRetain(rows["forget"], kept, tuple(not_read(root, others)))
