import torch

from hydraspec.tree import Tree, find_tree

TREE = Tree([[0], [1], [1, 0], [1, 1], [1, 1, 0]])


def _read(base, text):
    with torch.no_grad():
        return base.model(torch.tensor([text]), use_cache=False).logits[0]


def test_commit_leaves_the_cache_as_if_the_path_had_been_read_alone(tiny_llama):
    prompts, lengths = torch.randint(3, 96, (2, 9)), [9, 4]
    tokens = torch.randint(3, 96, (2, TREE.num_nodes))
    cache = tiny_llama.new_cache(2, 40)
    tiny_llama.prefill(prompts, lengths, cache)
    tiny_llama.verify(tokens, TREE, cache)
    cache.commit(torch.tensor([[0, 2, 4, 5], [0, 1, 1, 1]]), [4, 2])
    assert cache.lengths == [13, 6]
    more = torch.randint(3, 96, (2, TREE.num_nodes))
    logits = tiny_llama.verify(more, TREE, cache).logits
    kept = [prompts[0].tolist() + tokens[0, [0, 2, 4, 5]].tolist(), prompts[1, :4].tolist() + tokens[1, :2].tolist()]
    for row in (0, 1):
        for path in ([0, 1], [0, 2, 3], [0, 2, 4, 5]):
            plain = _read(tiny_llama, kept[row] + more[row, path].tolist())[-len(path) :]
            torch.testing.assert_close(logits[row, path], plain, rtol=1e-4, atol=1e-4)


def test_a_commit_without_its_gather_would_be_seen(tiny_llama):
    prompt, tokens = torch.randint(3, 96, (1, 9)), torch.randint(3, 96, (1, TREE.num_nodes))
    cache = tiny_llama.new_cache(1, 40)
    tiny_llama.prefill(prompt, [9], cache)
    tiny_llama.verify(tokens, TREE, cache)
    cache.advance([4])  # keeps nodes 0 to 3 instead of the path 0, 2, 4, 5
    logits = tiny_llama.verify(torch.tensor([[7]]), find_tree("root"), cache).logits[0, 0]
    plain = _read(tiny_llama, prompt[0].tolist() + tokens[0, [0, 2, 4, 5]].tolist() + [7])[-1]
    assert (logits - plain).abs().max() > 0.1


def test_rows_may_change_places_and_share_a_beginning(tiny_llama):
    prompts = torch.randint(3, 96, (3, 6))
    cache = tiny_llama.new_cache(3, 20)
    tiny_llama.prefill(prompts, [6, 3, 5], cache)
    cache.swap(0, 2)
    assert cache.lengths == [5, 3, 6]
    cache.copy_beginning(2, 1, 4)
    assert cache.lengths == [5, 4, 6]
    logits = tiny_llama.verify(torch.tensor([[8], [9], [7]]), find_tree("root"), cache).logits[:, 0]
    texts = [[*prompts[2, :5].tolist(), 8], [*prompts[0, :4].tolist(), 9], [*prompts[0].tolist(), 7]]
    for row, text in enumerate(texts):
        torch.testing.assert_close(logits[row], _read(tiny_llama, text)[-1], rtol=1e-4, atol=1e-4)


def test_forwards_work_on_the_rows_asked_for_and_leave_the_others(tiny_llama):
    prompts = torch.randint(3, 96, (4, 6))
    cache = tiny_llama.new_cache(4, 20)
    tiny_llama.prefill(prompts[:2], [6, 4], cache)
    tiny_llama.prefill(prompts[2:], [3, 5], cache, slice(2, 4))
    assert cache.lengths == [6, 4, 3, 5]
    tiny_llama.prefill(prompts[3:], [2], cache, slice(2, 3))
    cache.reset(3, 2)
    logits = tiny_llama.verify(torch.tensor([[8], [9], [7], [5]]), find_tree("root"), cache).logits[:, 0]
    p = prompts.tolist()
    texts = [[*p[0], 8], [*p[1][:4], 9], [*p[2][:3], *p[3][:2], 7], [*p[3][:2], 5]]
    for row, text in enumerate(texts):
        torch.testing.assert_close(logits[row], _read(tiny_llama, text)[-1], rtol=1e-4, atol=1e-4)


def test_prompts_may_be_read_in_pieces(tiny_llama):
    text = torch.randint(3, 96, (1, 12))
    cache = tiny_llama.new_cache(1, 20)
    tiny_llama.prefill(text[:, :5], [5], cache)
    logits = tiny_llama.prefill(text[:, 5:], [7], cache).logits[0, 0]
    torch.testing.assert_close(logits, _read(tiny_llama, text[0].tolist())[-1], rtol=1e-4, atol=1e-4)
