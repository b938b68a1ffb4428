"""Figures of merit: COCO average precision (`coco`) and the bound that the training targets set (`oracle`)."""
