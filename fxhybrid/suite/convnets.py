"""Convolutional networks, written out in their standard definitions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from fxhybrid.suite.case import Size, SuiteCase, class_loss
from fxhybrid.suite.sample_data import labels, smooth_images


def resnet50(size: Size, data: Generator) -> SuiteCase:
    batch, pixels = (16, 112) if size == "full" else (8, 64)
    model = ResNet((3, 4, 6, 3)) if size == "full" else ResNet((1, 2, 2, 1), width=16, n_classes=100)
    images = smooth_images(batch, pixels, data)
    return SuiteCase("resnet50", model, (images,), class_loss, (labels(batch, 100, data),))


def mobilenetv2(size: Size, data: Generator) -> SuiteCase:
    batch, pixels = (32, 96) if size == "full" else (16, 48)
    model = MobileNetV2() if size == "full" else MobileNetV2(scale=0.5, max_repeats=2, n_classes=100)
    images = smooth_images(batch, pixels, data)
    return SuiteCase("mobilenetv2", model, (images,), class_loss, (labels(batch, 100, data),))


def unet(size: Size, data: Generator) -> SuiteCase:
    batch, pixels = (8, 128) if size == "full" else (4, 48)
    model = UNet((32, 64, 128, 256)) if size == "full" else UNet((8, 16, 32, 64))
    images = smooth_images(batch, pixels, data)
    regions = smooth_images(batch, pixels, data, channels=4).argmax(1)
    return SuiteCase("unet", model, (images,), class_loss, (regions,))


class Bottleneck(nn.Module):
    """Applies 1x1, 3x3 (with the stride, as in ResNet v1.5) and 1x1 convolution around a shortcut."""

    def __init__(self, n_in: int, width: int, stride: int) -> None:
        super().__init__()
        n_out = 4 * width
        self.conv1 = nn.Conv2d(n_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, n_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(n_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or n_in != n_out:
            shortcut = nn.Conv2d(n_in, n_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += shortcut
        return self.relu(y)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """Stacks four stages of bottlenecks; blocks (3, 4, 6, 3) at width 64 are ResNet-50."""

    def __init__(self, blocks: Sequence[int], width: int = 64, n_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        stages: list[nn.Module] = []
        n_in = width
        for stage, n_blocks in enumerate(blocks):
            for block in range(n_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(Bottleneck(n_in, width << stage, stride))
                n_in = 4 * (width << stage)
        self.stages = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(n_in, n_classes)
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.stages(x))
        return self.fc(torch.flatten(x, 1))  # type: ignore[no-any-return]


class InvertedResidual(nn.Module):
    """Applies 1x1 expansion, 3x3 depthwise convolution and linear 1x1 projection."""

    def __init__(self, n_in: int, n_out: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = n_in * expand
        self.has_shortcut = stride == 1 and n_in == n_out
        expansion = [conv_bn_relu6(n_in, hidden, 1)] if expand != 1 else []
        self.conv = nn.Sequential(
            *expansion,
            conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, n_out, 1, bias=False),
            nn.BatchNorm2d(n_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.has_shortcut else y


class MobileNetV2(nn.Module):
    """Stacks MobileNetV2's stages; ``scale`` is its width multiplier, ``max_repeats`` shortens the stages."""

    # (expansion, channels, repeats, first stride) per stage
    STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, scale: float = 1.0, max_repeats: int = 4, n_classes: int = 1000) -> None:
        super().__init__()
        n_in, n_last = _divisible(32 * scale), _divisible(1280 * min(scale, 1.0))
        features: list[nn.Module] = [conv_bn_relu6(3, n_in, 3, 2)]
        for expand, channels, repeats, first_stride in self.STAGES:
            n_out = _divisible(channels * scale)
            for block in range(min(repeats, max_repeats)):
                features.append(InvertedResidual(n_in, n_out, first_stride if block == 0 else 1, expand))
                n_in = n_out
        features.append(conv_bn_relu6(n_in, n_last, 1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(n_last, n_classes))
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, 1))  # type: ignore[no-any-return]


class UNet(nn.Module):
    """Applies convolution pairs down and up again; each level's output is merged into its mirror level."""

    def __init__(self, widths: Sequence[int], n_classes: int = 4) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.down = nn.ModuleList(_double_conv(n_in, n_out) for n_in, n_out in zip((3, *widths), widths, strict=False))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(n_in, n_out, 2, 2) for n_in, n_out in pairs)
        self.merge = nn.ModuleList(_double_conv(2 * n_out, n_out) for _, n_out in pairs)
        self.head = nn.Conv2d(widths[0], n_classes, 1)
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        levels: list[Tensor] = []
        for down in self.down:
            x = down(self.pool(x) if levels else x)
            levels.append(x)
        levels.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([levels.pop(), up(x)], dim=1))
        return self.head(x)  # type: ignore[no-any-return]


def conv_bn_relu6(n_in: int, n_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Makes a convolution that keeps the size but for its stride, with batch norm and ReLU6."""
    conv = nn.Conv2d(n_in, n_out, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(n_out), nn.ReLU6(inplace=True))


def _double_conv(n_in: int, n_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n in (n_in, n_out):
        conv = nn.Conv2d(n, n_out, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _divisible(channels: float, divisor: int = 8) -> int:
    """Finds the nearest multiple of ``divisor`` that is no more than a tenth too small."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def _init_convolutions(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
