package agent

import "github.com/luks-kms-agent/luks-kms-agent/keycache"

// RecordedVolumes are the volumes of which there are records that can be read, in order of UUID. No disk is looked at, no lock
// is taken, and neither KMS nor IMDS is asked.
func RecordedVolumes(cfg Config) ([]keycache.VolumeRecord, error) {
	store, err := keycache.ViewStore(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	records, err := store.Load()
	if err != nil {
		return nil, err
	}
	var volumes []keycache.VolumeRecord
	for _, uuid := range sortedKeys(records.Volumes) {
		volumes = append(volumes, records.Volumes[uuid])
	}
	return volumes, nil
}
