"""The options of CE-LoRA and its variants; the published method is the default (`folklora.methods.celora`)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from folklora.methods.options import Options


class CELoRAOptions(Options):
    """CE-LoRA's options; the published method is the default."""

    similarity: Literal["data", "model", "both", "uniform", "size"] = "both"
    basis: Literal["private", "frozen", "aligned"] = "private"
    lambda_: float = Field(0.5, ge=0, le=1, alias="lambda", description="weight of data similarity in `both`")
    temperature: float = Field(0.5, ge=1e-6)
    components: int = Field(
        3, ge=0, le=64, description="of each class's mixture; 0: one, read off the class statistics"
    )
    projection: int = Field(0, ge=0, description="dimensions of a common random projection before the mixture; 0: none")
    init_std: float = Field(1e-3, gt=0, description="of A [code]")
    dp_epsilon: float | None = Field(None, gt=0, description="differentially private sketch: epsilon")
    dp_delta: float = Field(1e-5, gt=0, lt=1)
    dp_clip: float = Field(1.0, gt=0, description="L2 norm features are clipped to")
    refresh: int = Field(
        0, ge=0, le=100_000, description="rounds after which clients are asked for their sketches again; 0: never"
    )

    @model_validator(mode="after")
    def _private_sketch_is_statistics(self) -> CELoRAOptions:
        if self.dp_epsilon is not None and self.components:
            raise ValueError(
                f"dp_epsilon with components = {self.components}: a private release holds class statistics, not an EM "
                "fit; allowed: components = 0"
            )
        if self.dp_epsilon is not None and self.refresh:
            raise ValueError(
                f"refresh = {self.refresh} with dp_epsilon: what is released again is paid for again, and is not "
                "counted; allowed: refresh = 0"
            )
        if self.projection and not self.components:
            raise ValueError("projection applies to fitted mixtures; allowed: components >= 1, or projection = 0")
        return self

    @model_validator(mode="after")
    def _a_fitted_head_stays(self) -> CELoRAOptions:
        if self.refresh and self.start == "fitted":
            raise ValueError(
                f'refresh = {self.refresh} with head_start = "fitted": a head that was fitted follows no sketch; '
                'allowed: refresh = 0, or head_start = "zero", "sketched" or "auto"'
            )
        return self

    @model_validator(mode="after")
    def _one_core_for_all(self) -> CELoRAOptions:
        if (self.fedopt != "none" or self.scaffold) and not self.common_core:
            key = "scaffold = true" if self.scaffold else f'fedopt = "{self.fedopt}"'
            raise ValueError(
                f'{key} with similarity = "{self.similarity}" and basis = "{self.basis}": clients have no core in '
                'common; allowed: similarity = "uniform" or "size", with basis = "private" or "frozen"'
            )
        return self

    @property
    def common_core(self) -> bool:
        """Whether the server makes one core for all."""
        return self.similarity in {"uniform", "size"} and self.basis != "aligned"

    @property
    def uses_data(self) -> bool:
        return self.similarity == "data" or (self.similarity == "both" and self.lambda_ > 0)

    @property
    def sends_statistics(self) -> bool:
        return self.head_statistics or (self.uses_data and self.components == 0)
