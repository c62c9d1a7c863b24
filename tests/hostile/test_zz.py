import time, json
def test_t(scene):
    for _ in range(3):
        t=time.time(); v=scene.attack("kernel.set_the_clock", scene.attacker("python")); a=time.time()
        f=scene.facts(scene.attacker("python")); b=time.time()
        scene._assert_neighbour_is_unharmed(); c=time.time(); scene._assert_runner_is_unharmed(); d=time.time(); scene.host.assert_unchanged(); e=time.time()
        print("attack",a-t,"facts",b-a,"neigh",c-b,"runner",d-c,"host",e-d)
