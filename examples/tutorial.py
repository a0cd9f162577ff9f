"""Neural networks from the beginning, with fastmlp: `python examples/tutorial.py`.

Read it from top to bottom. Everything is ordinary PyTorch except `fastmlp.Linear`, which takes the
place of `torch.nn.Linear`: the same parameters, the same numbers.
"""

import torch
from torch import nn

import fastmlp

torch.manual_seed(0)  # the same random numbers in every run

# 1. Neurons and layers
#
# A neuron multiplies its inputs by weights, adds them up and adds a bias: w1 x1 + w2 x2 + ... + b.
# A layer is many neurons that look at the same inputs. Its weights form a matrix with one row for
# each neuron, so the whole layer is one product: x W^T + b.

layer = fastmlp.Linear(in_features=3, out_features=2)
x = torch.tensor([1.0, 2.0, 3.0])
by_hand = torch.stack([(row * x).sum() for row in layer.weight]) + layer.bias

print("1. A layer of 2 neurons with 3 inputs")
print(f"   layer:   {[round(v, 4) for v in layer(x).tolist()]}")
print(f"   by hand: {[round(v, 4) for v in by_hand.tolist()]}")

# 2. Activations
#
# Layers alone, one after the other, would be no more than a single layer: a product of matrices is
# a matrix. A bend between them, the activation, is what lets a network learn curves.
#
#   ReLU     max(z, 0)          cheap, and the usual choice
#   Tanh     from -1 to 1       smooth, centred at 0
#   Sigmoid  from 0 to 1        smooth, reads as a probability

z = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0])

print("\n2. Activations")
print(f"   {'z':8}{[round(v, 2) for v in z.tolist()]}")
for activation in (nn.ReLU(), nn.Tanh(), nn.Sigmoid()):
    print(f"   {type(activation).__name__:8}{[round(v, 2) for v in activation(z).tolist()]}")

# fastmlp computes layer and activation in one go if it is told both. The numbers stay the same.

fused = fastmlp.Linear(3, 2, activation="relu")
fused.load_state_dict(layer.state_dict())
torch.testing.assert_close(fused(x), torch.relu(layer(x)))

# 3. A network and its forward pass
#
# 10 inputs, 50 hidden neurons, 1 output. `forward` says how an output comes from an input; calling
# the model runs it.


class SimpleNN(nn.Module):
    """10 features, 50 hidden neurons, one output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = fastmlp.Linear(10, 50)
        self.fc2 = fastmlp.Linear(50, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output for (batch, 10)."""
        x = torch.relu(self.fc1(x))
        return self.fc2(x)


model = SimpleNN()
batch = torch.randn(4, 10)  # 4 samples at once: one row each

print("\n3. A network")
for name, parameter in model.named_parameters():
    print(f"   {name:10} {tuple(parameter.shape)}")
print(f"   forward pass: {tuple(batch.shape)} -> {tuple(model(batch).shape)}")

# 4. Losses
#
# A loss is one number that says how wrong the outputs are; learning is making it small.
#
#   MSELoss           the mean of (output - target)^2, for targets that are quantities
#   CrossEntropyLoss  how surprised the network is by the right class, for targets that are classes

output, target = torch.tensor([[2.0], [0.0]]), torch.tensor([[1.0], [0.0]])
logits, label = torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([0])  # logits: one score for each class

print("\n4. Losses")
print(f"   MSELoss          ((2 - 1)^2 + (0 - 0)^2) / 2 = {nn.MSELoss()(output, target):.3f}")
print(f"   CrossEntropyLoss class 0 scores highest and is right: {nn.CrossEntropyLoss()(logits, label):.3f}")
print(f"                    class 0 scores highest and is wrong: {nn.CrossEntropyLoss()(logits, label + 1):.3f}")

# 5. Optimizers and the training loop
#
# `loss.backward()` finds the gradient: for each parameter, how the loss would change with it. An
# optimizer then moves every parameter a little against its gradient.
#
#   SGD   the same rate for all parameters
#   Adam  a rate for each parameter, from the size of its recent gradients
#
# The data: 1000 samples of a curve in 10 dimensions, of which 200 are held out. A network may learn
# its training data by heart; only samples that it never saw tell whether it has understood.

features = torch.randn(1000, 10)
targets = torch.sin(2 * features[:, :1]) + features[:, 1:2] * features[:, 2:3]
x_train, y_train = features[:800], targets[:800]
x_held_out, y_held_out = features[800:], targets[800:]

loss_function = nn.MSELoss()


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The loop: for every mini-batch of every epoch the same four steps."""
    for epoch in range(1, 51):
        for rows in torch.randperm(len(x_train)).split(32):
            optimizer.zero_grad()  # 1. forget the gradients of the last step
            output = model(x_train[rows])  # 2. forward pass
            loss = loss_function(output, y_train[rows])  # 3. how wrong is it?
            loss.backward()  # 4. gradients, and a step against them
            optimizer.step()
        if epoch in (1, 10, 50):
            with torch.no_grad():  # measuring needs no gradients
                held_out = loss_function(model(x_held_out), y_held_out)
            print(f"   epoch {epoch:2}: last training loss {loss:.3f}, held-out loss {held_out:.3f}")


print("\n5. Training")
always_the_mean = y_train.mean().expand_as(y_held_out)
print(f"   without learning, always answering the mean: held-out loss {loss_function(always_the_mean, y_held_out):.3f}")

print("   SGD")
model = SimpleNN()
train(model, torch.optim.SGD(model.parameters(), lr=0.05))

print("   Adam")
model = SimpleNN()
train(model, torch.optim.Adam(model.parameters(), lr=0.005))

# 6. The whole network as one operation
#
# `fastmlp.MLP` builds layers and activations and runs them all in one call. Its parameters have the
# names of `nn.Sequential`, so either loads what the other has saved.

mlp = fastmlp.MLP(10, [50], 1, activation="relu")
sequential = nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 1))
sequential.load_state_dict(mlp.state_dict())
torch.testing.assert_close(mlp(batch), sequential(batch))

print("\n6. The same as one fastmlp.MLP")
print(mlp)
