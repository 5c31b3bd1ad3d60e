import os
import ray
def test_a(ray_session, request):
    assert os.environ["RAY_ADDRESS"] == ray_session
    assert ray.cluster_resources()["CPU"] == 4
    assert ray.get(ray.remote(lambda: 1).remote()) == 1
    assert request.node.get_closest_marker("cluster")
def test_b(ray_session):
    ray.init(address=ray_session, ignore_reinit_error=True)
