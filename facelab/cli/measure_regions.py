# SPDX-License-Identifier: Apache-2.0
"""What ``compute_metrics`` asks of a model's segmentation: does it fit the picture, and do its regions stand alone?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from facelab.cli.bars import Bar
from facelab.errors import UserError, an

if TYPE_CHECKING:
    from facelab.cli.measure import Session
    from facelab.metrics.generated_segmentation import LabelSpace


class SegmentedModel:
    """The part of a :class:`~facelab.cli.measure.Session` that looks at segmentations.

    Raises:
        UserError: the model makes none, has no codes of single regions, or there is nothing to compare with.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        model, request = session.model, session.request
        self.regions = tuple(getattr(model.generator, "region_names", ()))
        if "regions" in request.metrics and not self.regions:
            raise UserError(
                f"regions changes the codes of one region at a time: expected a model with such codes (cnerf), got a "
                f"{model.method} model; segmentation and consistency work without"
            )
        self.space = self._space()
        self.parser: Any = None
        if "segmentation" in request.metrics:
            self._check_segmentation()

    def _space(self) -> LabelSpace:
        from facelab.data.classes import CLASSES, NUM_CLASSES
        from facelab.data.regions import REGION_CLASSES, REGIONS
        from facelab.metrics.generated_segmentation import LabelSpace

        model = self.session.model
        if self.regions == REGIONS:
            return LabelSpace.of_groups(list(REGION_CLASSES.values()), REGIONS, NUM_CLASSES)
        if self.regions:
            return LabelSpace(self.regions)
        if model.has_labels:
            return LabelSpace(tuple(CLASSES), prepends_background=True)
        raise UserError(
            f"segmentation needs a model that makes one (fenerf, cnerf), {an(model.method)} model has no labels; "
            "consistency and frechet_random work without"
        )

    def _check_segmentation(self) -> None:
        from facelab.api import locate
        from facelab.data.parsing import load_parser
        from facelab.data.regions import REGIONS

        session = self.session
        if self.regions and self.regions != REGIONS:
            raise UserError(
                f"segmentation knows what the {len(REGIONS)} regions of the original mean, not {len(self.regions)} others"
            )
        path = session.request.parser
        if path is None and not session.on_synthetic:
            raise UserError(
                f"segmentation needs --parser FILE where pictures are not synthetic heads (--data {session.data}), "
                "got none; see prepare_data.py for parsers"
            )
        if path is not None:
            self.parser = load_parser(locate(path), session.model.device)

    def segmentation(self) -> dict[str, Any]:
        """Against a parser on the same pictures, and against known heads that look alike."""
        session = self.session
        found: dict[str, Any] = {"labels": list(self.space.names), "seed": session.request.seed}
        if self.parser is not None:
            found |= {"parser": self._against_parser()}
        if session.on_synthetic:
            found |= self._against_heads()
        found["value"] = found["parser" if self.parser is not None else "known_heads"]["value"]
        definition = (
            "mean IoU over the labels that occur in either map, mean over pictures. parser: of the generated segmentation "
            "and what a face parser sees in the generated picture. known_heads: of the segmentation of the generated head "
            "that looks most like a held-out synthetic one, same camera, and that head's true one; random: of any "
            "generated head; perfect_generator: the same with other synthetic heads and their truth as candidates. "
            "value is that of the parser where there is one."
        )
        return {"segmentation": {**found, "definition": definition}}

    def _against_parser(self) -> dict[str, Any]:
        from facelab.metrics.generated_segmentation import parser_report

        session = self.session
        count = session.request.num_images
        heads = session.generated(session.render_size)
        with Bar(count, "segmentation") as tick:
            found = parser_report(heads, count, lambda x, size: self.parser(x, size), self.space, tick)
        return {**found, "network": self.parser.name, "image_size": session.picture_size}

    def _against_heads(self) -> dict[str, Any]:
        from facelab.cli.measure import depth_side
        from facelab.metrics.generated_segmentation import generated_chunks, known_heads_report, synthetic_candidates

        session, r = self.session, self.session.request
        heads = session.generated(session.geometry_size)
        size = depth_side(heads)
        source = session.held_out(size, heads.settings.grid)
        known, count = source.batch(range(r.depth_heads)), r.depth_candidates
        with Bar(2 * r.depth_heads * count, "segmentation, known heads") as tick:
            found = known_heads_report(known, generated_chunks(heads, count, self.space), self.space, tick)
            others = synthetic_candidates(source, count, r.batch, self.space, start=r.depth_heads)
            perfect = known_heads_report(known, others, self.space, tick)
        return {"known_heads": {**found, "image_size": size, "perfect_generator": perfect["value"]}}

    def regions_report(self) -> dict[str, Any]:
        """One region at a time takes the codes of another head: what changes where."""
        from facelab.metrics.region_independence import PARTS, independence_report

        session, r = self.session, self.session.request
        heads = session.generated(session.render_size)
        with Bar(r.region_heads * len(self.regions) * len(PARTS), "regions") as tick:
            found = independence_report(
                heads, r.region_heads, self.regions, self.space.of_output, r.change_threshold, tick
            )
        definition = (
            "head i takes the shape code, the texture code or both of one region from head i + heads; a pixel changed if "
            "a channel did by more than threshold_levels of 255. outside_share: changed pixels outside the region's mask "
            "(before or after), of all changed ones; leak_share: of all pixels outside; inside_share: of those inside. "
            "value: outside_share of both codes, over all regions."
        )
        return {"regions": {**found, "image_size": session.picture_size, "definition": definition}}
