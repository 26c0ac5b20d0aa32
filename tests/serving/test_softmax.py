"""The softmax baseline behind the same endpoint."""

from tests.serving.conftest import generated, serving


def test_the_baseline_is_served_too(softmax_run):
    with serving(softmax_run) as server:
        settings = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
        answer = server.complete(seed=3, **settings)
        assert answer.choices[0].text == generated(server, "abc def", 3, **settings)[0]
        assert server.client.models.list().data[0].bitlm["output"] == "softmax"
        refused = server.post({"prompt": "a", "num_steps": 3})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "num_steps"
        refused = server.post({"prompt": "a", "temperature": -1})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "temperature"
        assert server.post({"prompt": "a"}, "/v1/bitlm/trace").status_code == 400
