package volumes

import (
	"os"
	"path/filepath"
	"testing"
)

func TestCloudInit(t *testing.T) {
	const (
		cfg, dropIn = "etc/cloud/cloud.cfg", "etc/cloud/cloud.cfg.d/90_luks-kms-agent.cfg"
		later       = "etc/cloud/cloud.cfg.d/99_site.cfg"
		line        = "/dev/nvme1n1 /mnt auto defaults,nofail,_netdev,comment=cloudconfig 0 2"
	)
	ours, err := os.ReadFile("../packaging/90_luks-kms-agent.cfg")
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		files map[string]string
		want  CloudInitFacts
	}{
		"none":                 {nil, CloudInitFacts{}},
		"nothing said":         {map[string]string{cfg: "users: [default]\n"}, CloudInitFacts{Installed: true}},
		"our drop-in":          {map[string]string{cfg: "", dropIn: string(ours)}, CloudInitFacts{Installed: true, LeftAlone: dropIn}},
		"in the main file":     {map[string]string{cfg: "mounts: [[ephemeral0]]\n"}, CloudInitFacts{Installed: true, LeftAlone: cfg}},
		"taken back later":     {map[string]string{cfg: "", dropIn: string(ours), later: "mounts: [[sdf, /opt]]\n"}, CloudInitFacts{Installed: true}},
		"mounted later":        {map[string]string{cfg: "", dropIn: string(ours), later: "mounts: [[ephemeral0, /x]]\n"}, CloudInitFacts{Installed: true, Mounts: later}},
		"a file that is wrong": {map[string]string{cfg: "", dropIn: string(ours), later: "mounts: {\n"}, CloudInitFacts{Installed: true, LeftAlone: dropIn}},
		"disabled":             {map[string]string{cfg: "", "etc/cloud/cloud-init.disabled": ""}, CloudInitFacts{Installed: true, Disabled: true}},
		"fstab":                {map[string]string{"etc/fstab": "# x\n/swap none swap sw,comment=cloudconfig 0 0\n" + line + "\n"}, CloudInitFacts{Line: line}},
		"fstab of others":      {map[string]string{"etc/fstab": "UUID=1 / ext4 defaults 0 1\n/dev/sdb none swap sw,comment=cloudconfig 0 0\n"}, CloudInitFacts{}},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			for file, text := range c.files {
				path := filepath.Join(root, file)
				if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			for _, file := range []*string{&c.want.LeftAlone, &c.want.Mounts} {
				if *file != "" {
					*file = filepath.Join(root, *file)
				}
			}
			if got, err := CloudInit(root); err != nil || got != c.want {
				t.Errorf("got %+v (%v), want %+v", got, err, c.want)
			}
		})
	}
}
