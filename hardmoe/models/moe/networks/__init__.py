"""Networks with layers of experts, made of torchvision's by replacing some of their pieces.

vmoe_s32 … vmoe_h14, vmoe_xs4    Riquelme et al., arXiv 2106.05974; any patch that divides the image
moe_vit_small, moe_vit_base      Videau et al., arXiv 2411.18322
moe_convnext_tiny/small/base     the same
moe_resnet18, moe_resnet50       Pavlitskaya et al., arXiv 2204.10598
"""
